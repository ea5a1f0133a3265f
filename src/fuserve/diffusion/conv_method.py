"""Which way a convolution is computed: direct, or Winograd's F(2x2) or, in floats, F(4x4).

Packed weights are the same for all of them, so the choice costs no memory and may depend on the
image: on its width alone, because a band of its rows must get the bits of the whole.
"""

from __future__ import annotations

from math import ceil

from fuserve.diffusion.program import Conv
from fuserve.kernels.conv import ConvMethod

# Cycles of a thread, as measured on a Zen 3 with AVX2, which does sixteen multiply-adds in one.
# Only ratios matter, and those hold for other machines too.
DIRECT_EFFICIENCY = 0.85
WINOGRAD_EFFICIENCY = 0.75
TRANSFORMED_CYCLES = 0.6
"""Of one component of a value of the input or output, on its way to or from the products."""
FILTER_CYCLES = 3.0
"""Of one component of sixteen filters, for as many squares as are multiplied together."""
CHUNK_SQUARES = 72
KERNEL_ROWS = 6
"""Squares that go through the kernel at once."""


INTEGER_RATE = 2.3
"""Of direct multiply-adds of int8, over fp32's; by Winograd they are of 16 bits, twice as fast."""
MOST_INTEGER_CHANNELS = 3640
"""Whose int8 by Winograd sum to 32 bits."""


def usual_method(op: Conv, *, is_integer: bool = False) -> ConvMethod:
    """The fastest method for images that are as high as wide; ``is_integer``: in int8."""
    if op.upsample:
        return ConvMethod.WINOGRAD2
    if op.size != 3 or op.stride != 1:
        return ConvMethod.DIRECT
    methods = [ConvMethod.DIRECT, ConvMethod.WINOGRAD2]
    if not is_integer:
        methods.append(ConvMethod.WINOGRAD4)
    elif _channels(op) > MOST_INTEGER_CHANNELS:
        methods.remove(ConvMethod.WINOGRAD2)
    return min(methods, key=lambda method: _cycles(op, method, is_integer))


def _channels(op: Conv) -> int:
    return sum(source.channels for source in op.sources)


def _cycles(op: Conv, method: ConvMethod, is_integer: bool) -> float:
    channels, tiles, side = _channels(op), ceil(op.out.channels / 16), op.out.width
    if method == ConvMethod.DIRECT:
        rows = KERNEL_ROWS * ceil(side * side / KERNEL_ROWS)
        rate = INTEGER_RATE if is_integer else 1.0
        return 9 * rows * channels * tiles / DIRECT_EFFICIENCY / rate
    outputs = 4 if method == ConvMethod.WINOGRAD4 else 2
    squares, components = ceil(side / outputs) ** 2, (outputs + 2) ** 2
    values = channels / 2 if is_integer else channels
    rows = KERNEL_ROWS * ceil(squares / KERNEL_ROWS)
    products = rows * values * tiles / WINOGRAD_EFFICIENCY
    filters = FILTER_CYCLES * ceil(squares / CHUNK_SQUARES) * values * tiles
    transforms = TRANSFORMED_CYCLES * squares * (values + op.out.channels)
    return components * (products + filters + transforms)
