"""Where commands write: figures to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(result: Mapping[str, Any]) -> None:
    """Write one JSON object on stdout."""
    print(json.dumps(result, ensure_ascii=False, indent=2))


def note(message: str) -> None:
    """Write one line to stderr."""
    print(message, file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print a list of names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def human_bytes(count: float) -> str:
    """``1234567`` -> ``1.23 MB``; decimal units, as memory bandwidth is quoted."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


LINE_EVERY_S = 10.0
"""How often long work says in a pipe where it is."""


class WorkProgress:
    """Shows long work on stderr: a bar on a terminal, now and then a line in a pipe.

    Used as a context manager; ``update`` takes what is being done, the items done, and the items
    in all.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task("loading", total=None)
        self._last_line_s = time.monotonic()

    def __enter__(self) -> WorkProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Say where the work is."""
        if self._is_terminal:
            self._bar.update(self._task, description=stage, completed=done, total=total)
        elif time.monotonic() - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            note(f"{stage}: {done} of {total}")
