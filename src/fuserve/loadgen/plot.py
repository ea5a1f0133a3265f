"""A run as a picture: who waited when, how throughput went, how latencies are spread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fuserve.errors import InvalidRequestError, MissingExtraError
from fuserve.loadgen.drive import Run
from fuserve.loadgen.report import gaps_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAITING, DECODING, ACCENT = "#c9ced8", "#2563eb", "#d97706"
NUM_BINS = 60
MAX_LANES = 200  # more lines than this cannot be told apart


def check_can_plot(path: Path) -> None:
    """Refuse before a run what would fail after it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidRequestError: the file's folder does not exist.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "bench", "A plot") from None
    if not path.absolute().parent.is_dir():
        raise InvalidRequestError(f"The folder of {path} does not exist; --plot needs it.")


def save_plot(run: Run, title: str, path: Path) -> None:
    """Write a PNG of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (lanes, tokens), (first, gaps) = figure.subplots(2, 2)
    figure.suptitle(title, fontsize=12)
    done = [answer for answer in run.answers if not answer.error and answer.chunk_s]
    _draw_lanes(lanes, run)
    _draw_throughput(tokens, run)
    _draw_distribution(first, [a.chunk_s[0] - a.due_s for a in done], "time to first token")
    _draw_distribution(gaps, [gap for a in done for gap in gaps_s(a)], "time between tokens")
    for axes in (lanes, tokens, first, gaps):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, format="png", dpi=120)


def _draw_lanes(axes: Axes, run: Run) -> None:
    """One line a request: grey until its first token, blue until its last."""
    answers = run.answers[:: -(-len(run.answers) // MAX_LANES)] if run.answers else []
    for lane, answer in enumerate(answers):
        due_s, end_s = answer.due_s - run.start_s, answer.end_s - run.start_s
        first_s = answer.chunk_s[0] - run.start_s if answer.chunk_s else end_s
        waiting = ACCENT if answer.error else WAITING
        axes.hlines(lane, due_s, first_s, color=waiting, linewidth=2)
        axes.hlines(lane, first_s, end_s, color=DECODING, linewidth=2)
    axes.set_title("requests: waiting, then decoding", loc="left", fontsize=10)
    axes.set_xlabel("s")
    axes.invert_yaxis()


def _draw_throughput(axes: Axes, run: Run) -> None:
    """Chunks per second over the run."""
    arrivals = _flat([a.chunk_s for a in run.answers if not a.error]) - run.start_s
    counts, edges = np.histogram(arrivals, bins=NUM_BINS, range=(0, max(run.duration_s, 1e-3)))
    axes.stairs(counts / np.diff(edges), edges, fill=True, color=DECODING, alpha=0.8)
    axes.set_title("chunks per second", loc="left", fontsize=10)
    axes.set_xlabel("s")


def _draw_distribution(axes: Axes, seconds: list[float], name: str) -> None:
    """The share of values below each, with the percentiles marked."""
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel("ms")
    if not seconds:
        return
    ms = np.sort(np.asarray(seconds) * 1e3)
    axes.step(ms, np.arange(1, len(ms) + 1) / len(ms), where="post", color=DECODING)
    for percent in (50, 90, 99):
        value = float(np.percentile(ms, percent))
        axes.axvline(value, color=ACCENT, linewidth=1, linestyle=":")
        axes.annotate(
            f"p{percent} {value:.1f}",
            (value, percent / 100),
            fontsize=8,
            color=ACCENT,
            textcoords="offset points",
            xytext=(4, -10),
        )
    axes.set_ylim(0, 1.02)


def _flat(lists: list[list[float]]) -> npt.NDArray[np.float64]:
    return np.asarray([value for values in lists for value in values], dtype=np.float64)
