"""Accuracy against size as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuserve.cli.eval_compare import Compared

LEAST_KL = 1e-4  # where a scheme that changes nothing is drawn, as the axis is logarithmic
MARGIN = 0.25  # of the width, for names beside the outermost points


def save_accuracy_plot(rows: Sequence[Compared], title: str, path: Path) -> None:
    """Write a PNG: each scheme's divergence from fp32 over its size; lower left is better."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = [row.size_bytes / 1e6 for row in rows]
    divergences = [max(row.mean_kl, LEAST_KL) for row in rows]
    axes.scatter(sizes, divergences, color="#2563eb", zorder=3)
    # Neighbours in divergence lie on different sides of their points, so as not to overlap.
    ranked = sorted(zip(rows, sizes, divergences, strict=True), key=lambda point: point[2])
    for rank, (row, size, divergence) in enumerate(ranked):
        right = rank % 2 == 0
        axes.annotate(
            f"{row.scheme}  {row.perplexity_change:+.1%}",
            (size, divergence),
            fontsize=8,
            textcoords="offset points",
            xytext=(7 if right else -7, 0),
            ha="left" if right else "right",
            va="center",
        )
    axes.set_title(f"{title}: change of perplexity beside the name", loc="left", fontsize=11)
    axes.set_xlabel("weights in MB")
    axes.set_ylabel("mean KL divergence from fp32, nats")
    axes.set_xscale("log")
    axes.margins(x=MARGIN)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    figure.savefig(path, format="png", dpi=120)
