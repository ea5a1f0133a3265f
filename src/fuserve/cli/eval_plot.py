"""Accuracy against size as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuserve.cli.eval_compare import Compared

LEAST_KL = 1e-6  # where a scheme that changes nothing is drawn, as the axis is logarithmic


def save_accuracy_plot(rows: Sequence[Compared], title: str, path: Path) -> None:
    """Write a PNG: each scheme's divergence from fp32 over its size; lower left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = [row.size_bytes / 1e6 for row in rows]
    divergences = [max(row.mean_kl, LEAST_KL) for row in rows]
    axes.scatter(sizes, divergences, color="#2563eb", zorder=3)
    for row, size, divergence in zip(rows, sizes, divergences, strict=True):
        axes.annotate(
            f"{row.scheme}  {row.perplexity_change:+.1%}",
            (size, divergence),
            fontsize=8,
            textcoords="offset points",
            xytext=(6, 3),
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("weights in MB")
    axes.set_ylabel("mean KL divergence from fp32, nats; beside the name: change of perplexity")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    figure.savefig(path, format="png", dpi=120)
