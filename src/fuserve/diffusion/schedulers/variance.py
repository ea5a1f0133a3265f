"""From a noise level to the factors of picture and noise whose squares sum to 1."""

from __future__ import annotations

from math import sqrt


def alpha_sigma(level: float) -> tuple[float, float]:
    """Factors of picture and noise, given noise over picture."""
    alpha = 1.0 / sqrt(level * level + 1.0)
    return alpha, level * alpha
