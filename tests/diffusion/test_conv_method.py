"""Which way a convolution is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuserve.diffusion.conv_method import usual_method
from fuserve.diffusion.program import Conv, Value
from fuserve.kernels.conv import ConvMethod


def conv(channels: int, side: int, **changes: object) -> Conv:
    source, out = (Value(i, 1, side, side, channels) for i in range(2))
    op = Conv("conv", out, (source,), ("weight",), padding=(1, 1, 1, 1))
    return replace(op, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "side"), [(1280, 16), (640, 32), (320, 64), (128, 512)])
def test_layers_of_stable_diffusion_take_large_squares(channels: int, side: int) -> None:
    assert usual_method(conv(channels, side)) == ConvMethod.WINOGRAD4


def test_images_smaller_than_the_kernel_s_rows_are_convolved_directly() -> None:
    assert usual_method(conv(128, 1)) == ConvMethod.DIRECT
    assert usual_method(conv(128, 2)) == ConvMethod.DIRECT


@pytest.mark.parametrize("channels", [320, 3640, 3641])
def test_integers_take_the_squares_whose_sums_fit(channels: int) -> None:
    fits = channels <= 3640
    want = ConvMethod.WINOGRAD2 if fits else ConvMethod.DIRECT
    assert usual_method(conv(channels, 64), is_integer=True) == want


@pytest.mark.parametrize("is_integer", [False, True])
@pytest.mark.parametrize("changes", [{"size": 1}, {"stride": 2}])
def test_winograd_is_for_filters_of_three_by_three(
    changes: dict[str, object], is_integer: bool
) -> None:
    assert usual_method(conv(320, 64, **changes), is_integer=is_integer) == ConvMethod.DIRECT


@pytest.mark.parametrize("is_integer", [False, True])
@pytest.mark.parametrize("side", [2, 64])
def test_what_is_enlarged_has_one_method(side: int, is_integer: bool) -> None:
    op = conv(320, side, upsample=True)
    assert usual_method(op, is_integer=is_integer) == ConvMethod.WINOGRAD2


@pytest.mark.parametrize("side", [4, 8, 16, 64])
def test_a_band_is_computed_as_the_whole_is(side: int) -> None:
    whole = conv(64, side)
    for height in (1, 2, 3, side):
        band = replace(whole, out=replace(whole.out, height=height))
        assert usual_method(band) == usual_method(whole)
