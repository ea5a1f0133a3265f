"""How far a picture is from the one that is painted without savings such as step caching."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fuserve.diffusion.generated_image import GeneratedImage

_PEAK = 255.0


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a picture from the one of the same prompt, seed and size.

    Attributes:
        psnr_db: peak signal-to-noise ratio of the pixels; infinite where they are the same.
        latents_error: Euclidean norm of the latents' difference over that of the exact latents.
    """

    psnr_db: float
    latents_error: float


def difference(image: GeneratedImage, exact: GeneratedImage) -> Difference:
    """Compare a picture with the exact one, of the same size."""
    pixels = image.pixels.astype(np.float64) - exact.pixels.astype(np.float64)
    mean_square = float(np.mean(pixels**2))
    psnr_db = math.inf if mean_square == 0.0 else 10 * math.log10(_PEAK**2 / mean_square)
    latents = exact.latents.astype(np.float64)
    error = float(np.linalg.norm(image.latents - latents) / np.linalg.norm(latents))
    return Difference(psnr_db, error)
