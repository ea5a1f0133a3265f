"""Which way a convolution is computed in floats: direct, or Winograd's F(2x2) or F(4x4).

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


def usual_method(op: Conv) -> ConvMethod:
    """The fastest method for images that are as high as wide."""
    if op.size != 3 or op.stride != 1 or op.upsample:
        return ConvMethod.DIRECT
    methods = (ConvMethod.DIRECT, ConvMethod.WINOGRAD2, ConvMethod.WINOGRAD4)
    return min(methods, key=lambda method: _cycles(op, method))


def _cycles(op: Conv, method: ConvMethod) -> float:
    channels, tiles = sum(source.channels for source in op.sources), ceil(op.out.channels / 16)
    side = op.out.width
    if method == ConvMethod.DIRECT:
        rows = KERNEL_ROWS * ceil(side * side / KERNEL_ROWS)
        return 9 * rows * channels * tiles / DIRECT_EFFICIENCY
    outputs = 4 if method == ConvMethod.WINOGRAD4 else 2
    squares, components = ceil(side / outputs) ** 2, (outputs + 2) ** 2
    rows = KERNEL_ROWS * ceil(squares / KERNEL_ROWS)
    products = rows * channels * tiles / WINOGRAD_EFFICIENCY
    filters = FILTER_CYCLES * ceil(squares / CHUNK_SQUARES) * channels * tiles
    values = TRANSFORMED_CYCLES * squares * (channels + op.out.channels)
    return components * (products + filters + values)
