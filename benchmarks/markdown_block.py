"""Tables in documents that a benchmark keeps up to date."""

from __future__ import annotations

from pathlib import Path


def replace_block(path: Path, name: str, markdown: str) -> None:
    """Replace what lies between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in a file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = path.read_text().partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n{markdown}\n{end}{after}")
