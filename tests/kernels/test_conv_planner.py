"""What the planner of convolutions chooses, and what it spends."""

from __future__ import annotations

import pytest

from fuserve.kernels.conv import ConvMethod, conv_shape
from fuserve.kernels.conv_planner import PlannedConv, choose_method, choose_methods

UNET = [
    PlannedConv(conv_shape((channels, 0), channels, 3), size, size)
    for channels, size in ((320, 64), (640, 32), (1280, 16), (1280, 8))
]


def test_large_images_go_by_squares_of_four_and_weights_alone_go_directly() -> None:
    methods = choose_methods(UNET)
    assert methods[:2] == [ConvMethod.WINOGRAD4, ConvMethod.WINOGRAD4]
    assert methods[3] != ConvMethod.WINOGRAD4


def test_what_has_no_winograd_form_is_direct() -> None:
    for shape in (
        conv_shape((320, 0), 320, 1),
        conv_shape((320, 0), 320, 3, stride=2),
        conv_shape((320, 0), 320, 3, upsample=True),
    ):
        assert choose_method(shape, 64, 64) == ConvMethod.DIRECT


def test_half_weights_go_by_squares_of_two_at_most() -> None:
    shape = conv_shape((320, 0), 320, 3, half=True)
    assert choose_method(shape, 64, 64) == ConvMethod.WINOGRAD2


def test_exact_means_direct() -> None:
    assert choose_methods(UNET, exact=True) == [ConvMethod.DIRECT] * len(UNET)


@pytest.mark.parametrize("budget", [0, 1 << 20, 10 << 20, 20 << 20, 100 << 20, 1 << 30])
def test_a_budget_is_kept_and_more_of_it_is_never_slower(budget: int) -> None:
    def extra(methods: list[ConvMethod]) -> int:
        return sum(
            conv.packed_bytes(method) - conv.packed_bytes(ConvMethod.DIRECT)
            for conv, method in zip(UNET, methods, strict=True)
        )

    def cycles(methods: list[ConvMethod]) -> float:
        return sum(conv.cycles(method) for conv, method in zip(UNET, methods, strict=True))

    methods = choose_methods(UNET, budget)
    assert extra(methods) <= budget
    direct = cycles([ConvMethod.DIRECT] * len(UNET))
    assert cycles(choose_methods(UNET)) <= cycles(methods) <= direct
    if budget >= 20 << 20:
        assert methods[0] != ConvMethod.DIRECT


def test_the_first_bytes_go_to_the_largest_image() -> None:
    methods = choose_methods(UNET, 12 << 20)
    assert methods[0] == ConvMethod.WINOGRAD4
    assert ConvMethod.WINOGRAD4 not in methods[1:]
