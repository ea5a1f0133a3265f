"""Packed weights and matrix products with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import LinearShape, PackedLinear, ThreadPool
from fuserve.kernels.machine import selected_isa

Packed = npt.NDArray[np.uint8]


class WeightFormat(IntEnum):
    """How packed weights are stored; the numbers are those of ``csrc/linear/format.h``."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q4 = 4
    Q4_ASYMMETRIC = 5
    Q8_CHANNEL = 6


class InputKind(IntEnum):
    """What a linear makes of its input; the numbers are those of ``csrc/linear/format.h``.

    ``BLOCKS`` is int8 with a scale for each token and 32 features, ``TOKEN`` with one for each
    token, ``FIXED`` with one for all. ``OUTLIERS`` is ``TOKEN``, but values beyond a threshold stay
    fp32 (LLM.int8(), arXiv 2208.07339). ``FLOATS`` rounds nothing.
    """

    BLOCKS = 0
    FLOATS = 1
    TOKEN = 2
    FIXED = 3
    OUTLIERS = 4


@dataclass(frozen=True, slots=True)
class Storage:
    """A weight format with its group size (features that share a scale; 0: a whole row)."""

    format: WeightFormat
    group_size: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether weights are quantized."""
        return self.format >= WeightFormat.Q8

    def describe(self) -> str:
        """A short name, such as ``int4 asymmetric, groups of 32``."""
        if not self.is_integer:
            return {0: "float32", 1: "float16", 2: "bfloat16"}[self.format]
        name = "int8" if self.format in (WeightFormat.Q8, WeightFormat.Q8_CHANNEL) else "int4"
        kind = " asymmetric" if self.format == WeightFormat.Q4_ASYMMETRIC else ""
        return f"{name}{kind}, " + (
            f"groups of {self.group_size}" if self.group_size else "per channel"
        )

    def shape(self, rows: int, cols: int, row_group: int = 0) -> LinearShape:
        """The packed layout of a ``[rows, cols]`` matrix; see ``csrc/linear/format.h``."""
        return LinearShape(int(self.format), rows, cols, self.group_size, row_group)


@dataclass(frozen=True, slots=True)
class LinearInput:
    """How a linear takes its input ``x``: ``(x - shift) * multiplier``, then as ``kind`` says.

    Attributes:
        kind: how it is quantized; the last three need ``Q8_CHANNEL`` weights.
        scale: of ``FIXED``, which rounds ``x / scale``.
        threshold: of ``OUTLIERS``.
        shift: ``float32`` or None.  # [cols]
        multiplier: ``float32`` or None.  # [cols]
    """

    kind: InputKind = InputKind.BLOCKS
    scale: float = 0.0
    threshold: float = 0.0
    shift: npt.NDArray[np.float32] | None = None
    multiplier: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized matrix.

    A value is ``scale * code`` in int8, ``scale * (code - 8)`` in symmetric int4, and
    ``scale * code + minimum`` in asymmetric int4.

    Attributes:
        codes: ``uint8`` (int8 codes as their bytes).  # [rows, cols]
        scales: ``float32``.  # [rows, groups]
        minimums: ``float32``, only for asymmetric int4.  # [rows, groups]
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    minimums: npt.NDArray[np.float32] | None = None


def pack_floats(
    shape: LinearShape,
    weights: npt.NDArray[np.generic],
    packed: Packed,
    pool: ThreadPool,
    *,
    bfloat: bool = False,
) -> None:
    """Pack fp32 or 16-bit weights ``[rows, cols]``, rounding to the nearest code if quantized.

    Args:
        shape: the target layout.
        weights: ``float32``, ``float16``, or ``uint16`` holding bfloat16 if ``bfloat``.
        packed: where to, ``shape.packed_bytes`` long.
        pool: the threads that do it.
        bfloat: how to read ``uint16``.

    Raises:
        ValueError: a shape or type does not fit.
    """
    if weights.dtype == np.float16:
        weights = weights.view(np.uint16)
    _native.pack_floats(selected_isa(), pool, shape, weights, bfloat, packed)


def pack_codes(shape: LinearShape, codes: Codes, packed: Packed, pool: ThreadPool) -> None:
    """Pack weights that are quantized already, without changing their grid.

    Raises:
        ValueError: a shape does not fit.
    """
    _native.pack_codes(
        selected_isa(), pool, shape, codes.codes, codes.scales, codes.minimums, packed
    )


def packed_linear(
    shape: LinearShape,
    packed: Packed,
    bias: npt.NDArray[np.float32] | None = None,
    given: LinearInput = LinearInput(),
) -> PackedLinear:
    """A packed matrix ready for products.

    Args:
        shape: its layout.
        packed: as ``pack_floats`` or ``pack_codes`` left it.
        bias: added to the product, with zeros where tiles have padding rows.  # [tiles * 16]
        given: what is done to the input first.

    Raises:
        ValueError: a size does not fit, or weights and input do not go together.
    """
    return PackedLinear(
        shape,
        packed,
        bias,
        int(given.kind),
        given.scale,
        given.threshold,
        given.shift,
        given.multiplier,
    )


def linear(
    weights: PackedLinear, num_outputs: int, x: npt.NDArray[np.float32], pool: ThreadPool
) -> npt.NDArray[np.float32]:
    """``x @ W.T + bias``.  # [rows, cols] -> [rows, num_outputs], padding rows included

    Raises:
        ValueError: a shape does not fit.
    """
    out = np.empty((x.shape[0], num_outputs), np.float32)
    _native.linear(selected_isa(), pool, weights, np.ascontiguousarray(x), out)
    return out
