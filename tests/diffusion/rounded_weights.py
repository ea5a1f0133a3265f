"""Random float weights rounded to integers, as a quantized checkpoint would have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from fuserve.diffusion.program import Array
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.diffusion.weights import ArrayWeights


def rounded(
    weight: Array,
    bits: Literal[4, 8] = 8,
    group_size: int = 0,
    input_scale: float | None = None,
    multiplier: Array | None = None,
) -> QuantizedWeight:
    """The nearest codes, the multiplier taken out first."""
    matrix = weight.reshape(len(weight), weight.shape[1], -1)  # [out, in, size * size]
    if multiplier is not None:
        matrix = matrix / multiplier[:, None]
    matrix = matrix.reshape(len(weight), -1)
    group = group_size or matrix.shape[1]
    starts = range(0, matrix.shape[1], group)
    largest = 127 if bits == 8 else 7
    scales = np.stack([np.abs(matrix[:, k : k + group]).max(axis=1) for k in starts], axis=1)
    scales = (scales / largest).astype(np.float16).astype(np.float32)  # as 4-bit layouts hold them
    wide = np.repeat(scales, group, axis=1)[:, : matrix.shape[1]]
    codes = np.clip(np.rint(matrix / wide), -largest, largest).astype(np.int8)
    return QuantizedWeight(
        codes.reshape(weight.shape), scales, bits, group_size, input_scale, multiplier
    )


class RoundedWeights(ArrayWeights):
    """Weights some of which are integers.

    Args:
        weights: all, in floats.
        quantize: what becomes of a weight; None: it stays as it is.
    """

    def __init__(
        self, weights: ArrayWeights, quantize: Callable[[str, Array], QuantizedWeight | None]
    ) -> None:
        self._floats, self._quantize = weights, quantize
        self.changed: dict[str, QuantizedWeight] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._floats

    def float32(self, name: str) -> Array:
        """The float weights, which no executor may ask for where there are integers."""
        assert self.quantized(name) is None
        return self._floats.float32(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._floats.shape(name)

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as integers."""
        if name in self.changed:
            return self.changed[name]
        return self._quantize(name, self._floats.float32(name))

    def replace(self, name: str, **fields: object) -> None:
        """Change fields of one tensor from now on."""
        weight = self.quantized(name)
        assert weight is not None
        self.changed[name] = replace(weight, **fields)
