"""Round-to-nearest, and the grids that every weight quantizer rounds to.

A grid's points are ``scale * (code - zero)`` with codes ``0 .. 2 ** bits - 1`` and an integer zero
point, as all interchange formats have them. Scales are rounded to float16 first, so that codes are
nearest under the scale that the kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.kernels.linear import Codes
from fuserve.quantization.quantized import QuantizedLinear
from fuserve.quantization.scheme import QuantScheme

Floats = npt.NDArray[np.float32]
UnsignedCodes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """The points that weights may take.

    Attributes:
        scheme: bits, groups, symmetry.
        scales: representable in float16; 0 where all weights are 0.  # [out, groups]
        zeros: whole numbers.  # [out, groups]
    """

    scheme: QuantScheme
    scales: Floats
    zeros: Floats

    @property
    def lowest(self) -> int:
        """The lowest code. Symmetric int8 leaves -128 out, so that it is as wide on both sides."""
        return 1 if self.scheme.weight_bits == 8 and self.scheme.symmetric else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return int(2**self.scheme.weight_bits) - 1

    def columns(self, groups: npt.NDArray[np.intp] | int) -> Grid:
        """The grid of the given groups, one for each column it is then used on."""
        picked = np.atleast_1d(groups)
        return Grid(self.scheme, self.scales[:, picked], self.zeros[:, picked])

    def nearest(self, weights: Floats) -> Floats:
        """Codes, as whole floats; one group per column, or a single one.  # [out, cols]"""
        inverse = np.divide(1.0, self.scales, out=np.zeros_like(self.scales), where=self.scales > 0)
        codes = np.rint(weights * inverse) + self.zeros
        return np.clip(codes, self.lowest, self.highest, out=codes)

    def values(self, codes: Floats) -> Floats:
        """What codes stand for.  # [out, cols]"""
        return (codes - self.zeros) * self.scales

    def pack(self, codes: Floats) -> Codes:
        """Codes of the whole matrix in the kernels' conventions."""
        unsigned = codes.astype(np.uint8)
        if not self.scheme.symmetric:
            return Codes(unsigned, self.scales, -self.scales * self.zeros)
        return Codes(unsigned ^ np.uint8(128 if self.scheme.weight_bits == 8 else 0), self.scales)


def group_of(scheme: QuantScheme, cols: int) -> npt.NDArray[np.intp]:
    """The group of each input feature.  # [in]"""
    return np.arange(cols) // (scheme.group_size or cols)


def fit_grid(weights: Floats, scheme: QuantScheme, shrink: Floats | float = 1.0) -> Grid:
    """The grid that spans each group's weights, and 0.

    Args:
        weights: the matrix, or only the features of one group.  # [out, in]
        scheme: bits, groups, symmetry.
        shrink: part of the span that the grid keeps; weights beyond are clipped.  # [out, groups]
    """
    starts = np.arange(0, weights.shape[1], scheme.group_size or weights.shape[1])
    high = np.maximum(np.maximum.reduceat(weights, starts, axis=1), 0) * shrink
    low = np.minimum(np.minimum.reduceat(weights, starts, axis=1), 0) * shrink
    levels = 2**scheme.weight_bits - 1
    middle = 2 ** (scheme.weight_bits - 1)
    if scheme.symmetric:
        half = 127.0 if scheme.weight_bits == 8 else levels / 2
        scales = _as_half(np.maximum(high, -low) / half)
        return Grid(scheme, scales, np.full_like(scales, middle))
    scales = _as_half((high - low) / levels)
    zeros = np.divide(-low, scales, out=np.zeros_like(scales), where=scales > 0)
    return Grid(scheme, scales, np.clip(np.rint(zeros), 0, levels))


def round_on(grid: Grid, weights: Floats) -> Floats:
    """Nearest codes of a whole matrix.  # [out, in]"""
    spread, split = _by_group(grid, weights)
    return spread.nearest(split).reshape(weights.shape)


def round_to_nearest(weights: Floats, scheme: QuantScheme) -> Codes:
    """Each weight at the nearest point of its group's grid.

    Args:
        weights: ``[out, in]``.
        scheme: bits, groups, symmetry.
    """
    grid = fit_grid(weights, scheme)
    return grid.pack(round_on(grid, weights))


def rounded_values(weights: Floats, scheme: QuantScheme, grid: Grid | None = None) -> Floats:
    """What :func:`round_to_nearest` makes of the weights, as floats.  # [out, in]"""
    grid = fit_grid(weights, scheme) if grid is None else grid
    spread, split = _by_group(grid, weights)
    return spread.values(spread.nearest(split)).reshape(weights.shape)


def _by_group(grid: Grid, weights: Floats) -> tuple[Grid, Floats]:
    """A grid and weights such that each weight meets its own group's scale."""
    rows, cols = weights.shape
    if cols % (grid.scheme.group_size or cols):  # the last group is cut short
        return grid.columns(group_of(grid.scheme, cols)), weights
    wide = Grid(grid.scheme, grid.scales[:, :, None], grid.zeros[:, :, None])
    return wide, weights.reshape(rows, grid.scales.shape[1], -1)


def unsigned_codes(layer: QuantizedLinear) -> tuple[UnsignedCodes, UnsignedCodes]:
    """A layer's codes from 0 up, and the zero point of each group, as files store them.

    ``[out, in]`` and ``[out, groups]``.
    """
    stored, bits = layer.codes, layer.scheme.weight_bits
    if stored.minimums is not None:
        scales = stored.scales
        zeros = np.divide(-stored.minimums, scales, out=np.zeros_like(scales), where=scales > 0)
        return stored.codes, np.rint(zeros).astype(np.uint8)
    codes = stored.codes ^ np.uint8(128 if bits == 8 else 0)
    return codes, np.full(stored.scales.shape, 2 ** (bits - 1), np.uint8)


def _as_half(scales: npt.NDArray[np.floating]) -> Floats:
    return scales.astype(np.float16).astype(np.float32)
