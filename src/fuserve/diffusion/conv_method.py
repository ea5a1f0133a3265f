"""Which way each convolution of a network is computed: direct, or Winograd's F(2x2) or F(4x4).

A layer has one method, whatever the image's size, so images do not depend on which sizes came
before. Winograd's weights are larger, by 1.8 and 4 times: what a memory budget leaves for that goes
to the layers where it saves most time by the byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from fuserve._native import ConvShape
from fuserve.diffusion.program import Conv
from fuserve.kernels.conv import ConvMethod

WINOGRAD4_MOST_BYTES = 12 << 20
WINOGRAD2_MOST_BYTES = 48 << 20
"""Unpacked fp32 bytes up to which a 3x3 convolution is worth F(4x4) or F(2x2). Few channels go with
large images in all these networks: where most of the arithmetic is, the weights are small."""

# Cycles of a thread, as measured on a Zen 3 with AVX2, which does sixteen multiply-adds in one.
# Only ratios matter, and those hold for other machines too.
DIRECT_EFFICIENCY = 0.85
WINOGRAD_EFFICIENCY = 0.75
TRANSFORMED_CYCLES = 0.6
"""Of one component of a value of the input or output, on its way to or from the products."""
WEIGHT_BYTES_PER_CYCLE = 4.0
"""What a thread reads of the weights beside its arithmetic."""
KERNEL_ROWS = 6
"""Squares that go through the kernel at once."""


def usual_method(op: Conv, *, half: bool) -> ConvMethod:
    """The fastest method, where memory is plenty; float16 weights are too coarse for F(4x4)."""
    if op.size != 3 or op.stride != 1 or op.upsample:
        return ConvMethod.DIRECT
    num_bytes = 36 * op.out.channels * sum(source.channels for source in op.sources)
    if num_bytes <= WINOGRAD4_MOST_BYTES and not half:
        return ConvMethod.WINOGRAD4
    return ConvMethod.WINOGRAD2 if num_bytes <= WINOGRAD2_MOST_BYTES else ConvMethod.DIRECT


@dataclass(frozen=True, slots=True)
class PlannedConv:
    """A convolution that is worth Winograd's transforms.

    Attributes:
        shape: with its usual method.
        height: of its images in pixels.
        width: likewise.
    """

    shape: ConvShape
    height: int
    width: int

    @property
    def methods(self) -> list[ConvMethod]:
        """What it can be computed by: its usual method, and those that take less memory."""
        return [method for method in ConvMethod if method <= int(self.shape.method)]

    def cycles(self, method: ConvMethod) -> float:
        """What an image costs with ``method``."""
        shape = self.shape.with_method(int(method))
        products = shape.in_channels * shape.tiles
        if method == ConvMethod.DIRECT:
            arithmetic = self.height * self.width * shape.taps * products / DIRECT_EFFICIENCY
            transforms = 0.0
        else:
            side = 4 if method == ConvMethod.WINOGRAD4 else 2
            squares = ceil(self.height / side) * ceil(self.width / side)
            rows = KERNEL_ROWS * ceil(squares / KERNEL_ROWS)
            arithmetic = rows * shape.components * products / WINOGRAD_EFFICIENCY
            values = squares * shape.components * (shape.in_channels + shape.out_channels)
            transforms = TRANSFORMED_CYCLES * values
        return float(max(arithmetic, shape.packed_bytes / WEIGHT_BYTES_PER_CYCLE) + transforms)

    def packed_bytes(self, method: ConvMethod) -> int:
        """Memory of the weights packed for ``method``."""
        return int(self.shape.with_method(int(method)).packed_bytes)


def choose_methods(convs: Sequence[PlannedConv], extra_bytes: int) -> list[ConvMethod]:
    """The fastest methods whose weights take ``extra_bytes`` more than those of direct ones.

    Greedily: the step to a larger method that saves most time by the byte is taken first.
    """
    methods = [ConvMethod.DIRECT] * len(convs)
    steps: list[tuple[float, int, ConvMethod]] = []

    def push(index: int) -> None:
        conv, now = convs[index], methods[index]
        for method in conv.methods:
            saved = conv.cycles(now) - conv.cycles(method)
            if method > now and saved > 0:
                extra = conv.packed_bytes(method) - conv.packed_bytes(now)
                heapq.heappush(steps, (-saved / extra, index, method))

    for index in range(len(convs)):
        push(index)
    while steps:
        _, index, method = heapq.heappop(steps)
        extra = convs[index].packed_bytes(method) - convs[index].packed_bytes(methods[index])
        if method > methods[index] and extra <= extra_bytes:
            extra_bytes -= extra
            methods[index] = method
            push(index)
    return methods
