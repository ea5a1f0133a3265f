"""Which way to compute each convolution of a network, by a model of their costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from fuserve._native import ConvShape
from fuserve.kernels.conv import ConvMethod

# Cycles of a thread, as measured on a Zen 3 with AVX2, which does sixteen multiply-adds in one.
# Only ratios matter, and those hold for other machines too.
DIRECT_EFFICIENCY = 0.85
WINOGRAD_EFFICIENCY = 0.75
TRANSFORMED_CYCLES = 0.6
"""Of one component of a value of the input or output, on its way to or from the products."""
WEIGHT_BYTES_PER_CYCLE = 4.0
"""What a thread reads of the weights beside its arithmetic."""
KERNEL_ROWS = 6
"""Pixels or squares that go through the kernel at once."""


@dataclass(frozen=True)
class PlannedConv:
    """A convolution of a network.

    Attributes:
        shape: with any method; its others are considered too.
        height: of its input image, in pixels, before upsampling.
        width: likewise.
    """

    shape: ConvShape
    height: int
    width: int

    def cycles(self, method: ConvMethod) -> float:
        """What an image costs with ``method``."""
        shape = self.shape.with_method(int(method))
        height, width = shape.out_height(self.height), shape.out_width(self.width)
        products = shape.in_channels * shape.tiles
        if method == ConvMethod.DIRECT:
            arithmetic = height * width * shape.taps * products / DIRECT_EFFICIENCY
            transforms = 0.0
        else:
            side = 4 if method == ConvMethod.WINOGRAD4 else 2
            squares = ceil(height / side) * ceil(width / side)
            rows = KERNEL_ROWS * ceil(squares / KERNEL_ROWS)
            arithmetic = rows * shape.components * products / WINOGRAD_EFFICIENCY
            values = squares * shape.components * (shape.in_channels + shape.out_channels)
            transforms = TRANSFORMED_CYCLES * values
        return float(max(arithmetic, shape.packed_bytes / WEIGHT_BYTES_PER_CYCLE) + transforms)

    def packed_bytes(self, method: ConvMethod) -> int:
        """Memory of the weights packed for ``method``."""
        return int(self.shape.with_method(int(method)).packed_bytes)


def choose_methods(
    convs: Sequence[PlannedConv], extra_bytes: int | None = None, *, exact: bool = False
) -> list[ConvMethod]:
    """The fastest methods whose weights fit into a budget.

    Memory goes first to what saves most time by the byte, which are the convolutions of large
    images.

    Args:
        convs: of a network.
        extra_bytes: what their packed weights may take beyond those of direct convolutions; None:
            anything.
        exact: direct convolutions alone, whose sums are those of the definition.
    """
    methods = [ConvMethod.DIRECT] * len(convs)
    if exact:
        return methods
    left = float("inf") if extra_bytes is None else extra_bytes
    candidates: list[tuple[float, int, ConvMethod]] = []
    for index, conv in enumerate(convs):
        _push_best(candidates, conv, index, ConvMethod.DIRECT)
    while candidates:
        _, index, method = heapq.heappop(candidates)
        conv = convs[index]
        extra = conv.packed_bytes(method) - conv.packed_bytes(methods[index])
        if extra > left:
            # What saves less in all may still fit.
            if method == ConvMethod.WINOGRAD4 and methods[index] == ConvMethod.DIRECT:
                _push(candidates, conv, index, ConvMethod.DIRECT, ConvMethod.WINOGRAD2)
            continue
        left -= extra
        methods[index] = method
        _push_best(candidates, conv, index, method)
    return methods


def choose_method(
    shape: ConvShape,
    height: int,
    width: int,
    extra_bytes: int | None = None,
    *,
    exact: bool = False,
) -> ConvMethod:
    """As ``choose_methods``, for a single convolution."""
    return choose_methods([PlannedConv(shape, height, width)], extra_bytes, exact=exact)[0]


def _push_best(
    candidates: list[tuple[float, int, ConvMethod]], conv: PlannedConv, index: int, now: ConvMethod
) -> None:
    """Add the step from ``now`` to a larger method that saves most cycles by the byte."""
    steps: list[tuple[float, int, ConvMethod]] = []
    for method in ConvMethod:
        if method > now and conv.shape.has_method(int(method)):
            _push(steps, conv, index, now, method)
    if steps:
        heapq.heappush(candidates, steps[0])


def _push(
    steps: list[tuple[float, int, ConvMethod]],
    conv: PlannedConv,
    index: int,
    now: ConvMethod,
    method: ConvMethod,
) -> None:
    saved = conv.cycles(now) - conv.cycles(method)
    if saved > 0:
        extra = conv.packed_bytes(method) - conv.packed_bytes(now)
        heapq.heappush(steps, (-saved / extra, index, method))
