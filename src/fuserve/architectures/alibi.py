"""Slopes of ALiBi, attention with linear biases (arXiv 2108.12409)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def alibi_slopes(num_heads: int) -> npt.NDArray[np.float32]:
    """One slope per head; ``slope * key_position`` is added to the scaled scores.  # [heads]

    For a number of heads that is no power of two, the paper's code takes the slopes of the next
    lower power of two and fills up with every other slope of the next higher one.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / lower) for head in range(num_heads - lower)]
    return np.array(slopes, np.float32)
