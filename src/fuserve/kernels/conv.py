"""Convolutions over NHWC images with packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import ConvShape, PackedConv, ThreadPool
from fuserve.kernels.machine import selected_isa

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint8]


class ConvMethod(IntEnum):
    """How a convolution is computed; the numbers are those of ``csrc/conv/conv_types.h``.

    ``WINOGRAD2`` and ``WINOGRAD4`` are F(2x2, 3x3) and F(4x4, 3x3) of arXiv 1509.09308: 2.25 and 4
    times fewer multiplications, errors of about 1e-6 and 1e-5 of the output's rms, from the packed
    weights that ``DIRECT`` has. In int8 ``WINOGRAD2`` is exact, as ``DIRECT`` is. Upsampling
    convolutions have ``WINOGRAD2`` alone: four times fewer multiplications, and no rounding of the
    input but in differences of neighbours.
    """

    DIRECT = 0
    WINOGRAD2 = 1
    WINOGRAD4 = 2


class ConvWeights(IntEnum):
    """What weights are kept as; the numbers are those of ``csrc/conv/conv_types.h``.

    ``INT8`` multiplies inputs of int8, too.
    """

    FLOAT32 = 0
    FLOAT16 = 1
    INT8 = 2


class ConvActivation(IntEnum):
    """What is applied last; the numbers are those of ``csrc/conv/conv_types.h``."""

    NONE = 0
    RELU = 1
    SILU = 2


@dataclass(frozen=True, slots=True)
class ConvInput:
    """What a convolution sees: ``silu?(x * scale + shift)`` of one or two images' channels.

    Attributes:
        first: ``float32``.  # [batch, height, width, channels]
        second: channels that follow those of ``first``, or None.
        scale: with ``shift``, what a GroupNorm came down to, or None.  # [batch or 1, in channels]
        shift: as ``scale``.
        silu: whether SiLU is applied then. Padding is zero after all this.
    """

    first: Floats
    second: Floats | None = None
    scale: Floats | None = None
    shift: Floats | None = None
    silu: bool = False


@dataclass(frozen=True, slots=True)
class ConvQuantization:
    """What the int8 of an integer convolution stand for.

    What ``ConvInput`` describes is taken as ``round(x * multiplier / input_scale)`` within ±127,
    and the exact sum of products as ``sum * input_scale * scales``.

    Attributes:
        scales: ``float32``.  # [out channels]
        input_scale: above 0.
        multiplier: ``float32``, or None for one everywhere.  # [in channels]
    """

    scales: Floats
    input_scale: float
    multiplier: Floats | None = None


@dataclass(frozen=True, slots=True)
class ConvEpilogue:
    """What becomes of the product and its bias, in this order.

    Attributes:
        channel_add: added to all pixels, or None.  # [batch or 1, out channels]
        residual: added to each, or None.  # [batch, out height, out width, out channels]
        activation: applied last.
    """

    channel_add: Floats | None = None
    residual: Floats | None = None
    activation: ConvActivation = ConvActivation.NONE


@dataclass(frozen=True, slots=True)
class ConvCut:
    """How an image is cut into units of work; 0 leaves it to the kernel. It changes no result.

    Attributes:
        band_rows: output rows of a unit; a multiple of 4 suits every method.
        unit_tiles: 16-channel output tiles of a unit.
    """

    band_rows: int = 0
    unit_tiles: int = 0


def conv_shape(
    channels: tuple[int, int],
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: tuple[int, int, int, int] | None = None,
    upsample: bool = False,
    method: ConvMethod = ConvMethod.DIRECT,
    weights: ConvWeights = ConvWeights.FLOAT32,
) -> ConvShape:
    """The shape of a convolution, which says how its weights are packed.

    Args:
        channels: of the first and the second source; 0 without a second.
        out_channels: how many.
        size: of the filter, 1 or 3.
        stride: 1 or 2.
        padding: top, left, bottom, right; None keeps an image's size at stride 1.
        upsample: enlarge the input twice first, to nearest (size 3, stride 1, padding 1).
        method: how it is computed. Winograd needs size 3 and stride 1, ``WINOGRAD4`` floats;
            ``upsample`` needs ``WINOGRAD2``.
        weights: what they are kept as.

    Raises:
        ValueError: the arguments do not go together.
    """
    side = size // 2
    sides = (side, side, side, side) if padding is None else padding
    return ConvShape(
        channels, out_channels, size, stride, sides, upsample, int(method), int(weights)
    )


def pack_conv(
    shape: ConvShape,
    weights: npt.NDArray[np.generic],
    packed: Packed,
    pool: ThreadPool,
    *,
    bfloat: bool = False,
) -> None:
    """Pack weights as checkpoints have them.

    Args:
        shape: the target layout.
        weights: contiguous; ``float32``, ``float16``, or ``uint16`` holding bfloat16 if ``bfloat``.
            # [out channels, in channels, size, size]
        packed: where to, ``shape.packed_bytes`` long.
        pool: the threads that do it.
        bfloat: how to read ``uint16``.

    Raises:
        ValueError: a shape or type does not fit.
    """
    if weights.dtype == np.float16:
        weights = weights.view(np.uint16)
    _native.pack_conv(pool, shape, weights, bfloat, packed)


def pack_conv_codes(
    shape: ConvShape, codes: npt.NDArray[np.int8], packed: Packed, pool: ThreadPool
) -> None:
    """Pack the weights of an integer convolution.

    Args:
        shape: the target layout, of ``INT8``.
        codes: within ±127, contiguous.  # [out channels, in channels, size, size]
        packed: where to, ``shape.packed_bytes`` long.
        pool: the threads that do it.

    Raises:
        ValueError: the shape does not fit.
    """
    _native.pack_conv_codes(pool, shape, codes, packed)


def packed_conv(
    shape: ConvShape,
    packed: Packed,
    bias: Floats | None = None,
    quantization: ConvQuantization | None = None,
) -> PackedConv:
    """Packed weights ready for convolutions.

    Args:
        shape: their layout.
        packed: as ``pack_conv`` or ``pack_conv_codes`` left it.
        bias: added to all pixels, or None.  # [out channels]
        quantization: of an integer convolution.

    Raises:
        ValueError: a size does not fit, or an integer convolution has no quantization.
    """
    padded = None if bias is None else _padded(shape, bias, "bias")
    if quantization is None:
        return PackedConv(shape, packed, padded)
    return PackedConv(
        shape,
        packed,
        padded,
        quantization.input_scale,
        _padded(shape, quantization.scales, "scales"),
        quantization.multiplier,
    )


def _padded(shape: ConvShape, vector: Floats, name: str) -> Floats:
    """A value for each output channel, with zeros up to whole tiles."""
    if vector.shape != (shape.out_channels,):
        raise ValueError(f"{name} must be [{shape.out_channels}], got {list(vector.shape)}")
    return np.pad(vector, (0, 16 * shape.tiles - shape.out_channels))


def convolve(
    weights: PackedConv,
    given: ConvInput,
    pool: ThreadPool,
    epilogue: ConvEpilogue = ConvEpilogue(),
    cut: ConvCut = ConvCut(),
) -> Floats:
    """A convolution of a batch of images.

    Returns:
        ``float32``, the same bit for bit whatever the batch, the cut and the number of threads.
        # [batch, out height, out width, out channels]

    Raises:
        ValueError: a shape does not fit.
    """
    shape = weights.shape
    batch, height, width, _ = given.first.shape
    size = shape.out_height(height), shape.out_width(width)
    out = np.empty((batch, *size, shape.out_channels), np.float32)
    _native.convolve(
        selected_isa(),
        pool,
        weights,
        given.first,
        given.second,
        given.scale,
        given.shift,
        given.silu,
        epilogue.channel_add,
        epilogue.residual,
        int(epilogue.activation),
        cut.band_rows,
        cut.unit_tiles,
        out,
    )
    return out
