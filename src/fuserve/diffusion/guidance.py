"""Classifier-free guidance: Ho and Salimans, Classifier-Free Diffusion Guidance (2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def guide(
    negative: FloatArray, positive: FloatArray, scale: float, rescale: float = 0.0
) -> FloatArray:
    """Go from the negative prompt's prediction through the prompt's, and ``scale`` times as far.

    Args:
        negative: prediction for the negative prompt, ``[images, height, width, channels]``.
        positive: prediction for the prompt.
        scale: 1 is the prompt's prediction itself.
        rescale: how far the contrast is brought back to that of the prompt's prediction, 0 to 1:
            Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed (2023), eq. 15.

    Returns:
        A new array; the arguments may be memory that the next step writes to.
    """
    guided = positive - negative
    guided *= np.float32(scale)
    guided += negative
    if rescale > 0.0:
        per_image = (1, 2, 3)
        contrast = positive.std(axis=per_image, ddof=1, keepdims=True)
        contrast /= guided.std(axis=per_image, ddof=1, keepdims=True)
        guided *= np.float32(rescale) * contrast + np.float32(1.0 - rescale)
    return guided
