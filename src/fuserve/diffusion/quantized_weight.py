"""A layer's weights as integers, with what its input becomes before the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Weights of 8 or 4 bits for inputs of 8 (W8A8, W4A8).

    The layer is ``(round(x * multiplier / input_scale) @ values.T) * input_scale * scales``, the
    rounded input clipped to ±127. For a convolution ``x`` is what its norm makes of the image;
    padding is zero.

    Attributes:
        values: codes in the shape of the checkpoint's tensor; of 4 bits they are in ±7.
        scales: what a code stands for, of each output channel and group.  # [out, groups]
        bits: of a code.
        group_size: input channels that share a scale, a multiple of 32; 0: all of them.
        input_scale: what one step of the input stands for; None: each token (of 4-bit weights:
            each block of 32 channels of it) has its own, of its largest value.
        multiplier: of the input's channels, taken out of the weights: SmoothQuant's smoothing
            (arXiv 2211.10438) and the separate scales of the halves of a concatenated input. None:
            one everywhere.  # [in]
    """

    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bits: Literal[4, 8] = 8
    group_size: int = 0
    input_scale: float | None = None
    multiplier: npt.NDArray[np.float32] | None = None

    def float32(self) -> npt.NDArray[np.float32]:
        """The weights that the codes stand for, for inputs as they are; in the shape of values."""
        rows = len(self.values)
        flat = self.values.reshape(rows, -1).astype(np.float32)  # [out, in * size * size]
        columns = self.group_size or flat.shape[1]
        flat *= np.repeat(self.scales, columns, axis=1)[:, : flat.shape[1]]
        values = flat.reshape(self.values.shape)
        if self.multiplier is not None:
            values *= self.multiplier.reshape(-1, *(1,) * (values.ndim - 2))
        return values
