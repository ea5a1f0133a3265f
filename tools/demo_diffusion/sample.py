"""Pictures of captions by diffusers' own pipeline, and their score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from tools.demo_diffusion import scenes, score

_BATCH = 50


def pictures(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[scenes.Caption],
    steps: int,
    guidance: float,
) -> list[NDArray[np.uint8]]:
    """One picture of each caption, uint8 [64, 64, 3]; caption n is drawn with seed n."""
    pipeline.set_progress_bar_config(disable=True)
    painted: list[NDArray[np.uint8]] = []
    for first in range(0, len(captions), _BATCH):
        some = [str(caption) for caption in captions[first : first + _BATCH]]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        images = pipeline(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            output_type="np",
        ).images
        painted += list(np.rint(images * 255).astype(np.uint8))
    return painted


def measure(
    painted: Sequence[NDArray[np.uint8]], captions: Sequence[scenes.Caption]
) -> dict[str, float]:
    """The shares that are right, see ``score.share``."""
    return score.share([score.judge(p, c) for p, c in zip(painted, captions, strict=True)])


def contact_sheet(painted: Sequence[NDArray[np.uint8]], file: Path, columns: int = 8) -> None:
    """Write the pictures side by side, twice as large."""
    rows = [painted[i : i + columns] for i in range(0, len(painted) // columns * columns, columns)]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    Image.fromarray(sheet.repeat(2, 0).repeat(2, 1)).save(file)
