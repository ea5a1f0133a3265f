"""Integer convolutions equal their integer reference bit for bit, in any cut."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from fuserve._native import PackedConv, ThreadPool
from fuserve.kernels.conv import (
    ConvActivation,
    ConvCut,
    ConvEpilogue,
    ConvInput,
    ConvMethod,
    ConvQuantization,
    ConvWeights,
    conv_shape,
    convolve,
    pack_conv,
    pack_conv_codes,
    packed_conv,
)
from tests.kernels.conv_case import ConvCase

Floats = npt.NDArray[np.float32]
NONE = (0, 0, 0, 0)


@dataclass(frozen=True)
class Case(ConvCase):
    multiplier: bool = False
    extreme: float = 0.0
    """The part of the inputs that is at an end of the range, where sums of 16 bits overflow."""

    __str__ = ConvCase.__str__


@dataclass(frozen=True)
class Problem:
    """A case with its operands and what the definition makes of them."""

    case: Case
    codes: npt.NDArray[np.int8]
    bias: Floats | None
    quantization: ConvQuantization
    given: ConvInput
    epilogue: ConvEpilogue
    want: Floats

    def pack(self, method: ConvMethod) -> PackedConv:
        shape = self.case.shape(method, ConvWeights.INT8)
        packed = np.full(shape.packed_bytes, 255, np.uint8)
        pack_conv_codes(shape, self.codes, packed, ThreadPool(2))
        return packed_conv(shape, packed, self.bias, self.quantization)


def problem(case: Case) -> Problem:
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))

    def normal(*shape: int) -> Floats:
        return rng.standard_normal(shape, np.float32)

    image = (case.batch, case.height, case.width)
    total = sum(case.channels)
    codes = rng.integers(-127, 128, (case.out_channels, total, case.size, case.size), np.int8)
    first, second = (normal(*image, c) if c else None for c in case.channels)
    assert first is not None
    for source in (first, second):
        if source is not None and case.extreme:
            source[rng.random(source.shape) < case.extreme] *= 100
    scale = normal(case.batch, total) if case.norm else None
    shift = normal(case.batch, total) if case.norm else None
    multiplier = np.abs(normal(total)) + np.float32(0.3) if case.multiplier else None
    quantization = ConvQuantization(np.abs(normal(case.out_channels)), 0.031, multiplier)
    bias = normal(case.out_channels) if case.bias else None
    channel_add = normal(case.batch, case.out_channels) if case.channel_add else None
    given = ConvInput(first, second, scale, shift, case.silu)

    out = product(case, codes, input_codes(given, quantization))
    out = out.astype(np.float32) * (np.float32(quantization.input_scale) * quantization.scales)
    residual = normal(*out.shape) if case.residual else None
    for term in (bias, None if channel_add is None else channel_add[:, None, None], residual):
        out = out if term is None else out + term
    if case.activation == ConvActivation.RELU:
        out = np.maximum(out, 0)
    epilogue = ConvEpilogue(channel_add, residual, case.activation)
    return Problem(case, codes, bias, quantization, given, epilogue, out)


def input_codes(given: ConvInput, quantization: ConvQuantization) -> npt.NDArray[np.float64]:
    """The integers of the input, each step rounded to float32 as the kernel does."""
    parts = [given.first] if given.second is None else [given.first, given.second]
    x = np.concatenate(parts, axis=3)
    if given.scale is not None and given.shift is not None:
        exact = x.astype(np.float64) * given.scale[:, None, None] + given.shift[:, None, None]
        x = exact.astype(np.float32)
    if given.silu:
        x = F.silu(torch.from_numpy(x)).numpy()
    if quantization.multiplier is not None:
        x = x * quantization.multiplier
    x = x * (np.float32(1) / np.float32(quantization.input_scale))
    return np.clip(np.rint(x), -127, 127).astype(np.float64)


def product(
    case: Case, codes: npt.NDArray[np.int8], x: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Exact sums  # [batch, out height, out width, out channels]."""
    seen = torch.from_numpy(x).permute(0, 3, 1, 2)
    if case.upsample:
        seen = F.interpolate(seen, scale_factor=2, mode="nearest")
    top, left, bottom, right = case.padding
    seen = F.pad(seen, (left, right, top, bottom))
    out = F.conv2d(seen, torch.from_numpy(codes).double(), stride=case.stride)
    return np.rint(out.permute(0, 2, 3, 1).numpy())


CASES = [
    Case((32, 0), 16, 8, 8),
    Case((5, 0), 3, 7, 9, batch=2, padding=(0, 1, 1, 0)),
    Case((150, 0), 40, 6, 13, 2, norm=True, multiplier=True, channel_add=True, extreme=0.01),
    Case((40, 100), 20, 9, 6, 2, norm=True, multiplier=True, channel_add=True, residual=True),
    Case((64, 64), 33, 5, 11, residual=True, activation=ConvActivation.RELU, extreme=0.9),
    Case((64, 0), 64, 1, 1, bias=False),
    Case((40, 0), 16, 8, 10, batch=3, stride=2, norm=True, extreme=0.02),
    Case((33, 7), 19, 7, 5, stride=2, padding=(0, 0, 1, 1), residual=True, extreme=0.5),
    Case((70, 30), 18, 5, 4, 2, upsample=True, multiplier=True, residual=True, extreme=0.02),
    Case((24, 0), 24, 3, 5, upsample=True, norm=True, extreme=1.0),
    Case((600, 9), 21, 5, 3, 2, size=1, padding=NONE, norm=True, residual=True, extreme=0.02),
    Case((48, 0), 40, 6, 7, size=1, padding=NONE, multiplier=True, extreme=0.7),
    Case((20, 0), 32, 9, 8, size=1, stride=2, padding=NONE),
]


def methods(cases: list[Case]) -> list[tuple[Case, ConvMethod]]:
    """Each case by every method that can compute it."""
    return [
        (case, method)
        for case in cases
        for method in (ConvMethod.DIRECT, ConvMethod.WINOGRAD2)
        if (case.size == 3 and case.stride == 1 if method else not case.upsample)
    ]


@pytest.mark.parametrize(("case", "method"), methods(CASES), ids=str)
def test_integer_convolutions_are_exact(isa: str, case: Case, method: ConvMethod) -> None:
    given = problem(case)
    got = convolve(given.pack(method), given.given, ThreadPool(2), given.epilogue)
    np.testing.assert_array_equal(got, given.want)


def test_the_longest_sums_do_not_overflow(isa: str) -> None:
    """2**16 products of 127 and 127, and of -127 and 127, are within 32 bits."""
    channels = 1 << 16
    shape = conv_shape((channels, 0), 2, 1, padding=NONE, weights=ConvWeights.INT8)
    codes = np.full((2, channels, 1, 1), 127, np.int8)
    codes[1] = -127
    packed = np.zeros(shape.packed_bytes, np.uint8)
    pack_conv_codes(shape, codes, packed, ThreadPool(2))
    weights = packed_conv(shape, packed, None, ConvQuantization(np.ones(2, np.float32), 1.0))
    for value in (127, -127):
        image = np.full((1, 1, 3, channels), value, np.float32)
        got = convolve(weights, ConvInput(image), ThreadPool(2))
        want = 127 * value * channels
        np.testing.assert_array_equal(got, np.tile(np.float32([want, -want]), (1, 1, 3, 1)))


@pytest.mark.parametrize("value", [127, -127])
@pytest.mark.parametrize("upsample", [False, True])
def test_the_longest_sums_of_winograd_do_not_overflow(isa: str, upsample: bool, value: int) -> None:
    channels = (1 << (16 if upsample else 15)) // 9
    shape = conv_shape(
        (channels, 0),
        2,
        3,
        upsample=upsample,
        method=ConvMethod.WINOGRAD2,
        weights=ConvWeights.INT8,
    )
    codes = np.full((2, channels, 3, 3), 127, np.int8)
    codes[1] = -127
    packed = np.zeros(shape.packed_bytes, np.uint8)
    pack_conv_codes(shape, codes, packed, ThreadPool(2))
    weights = packed_conv(shape, packed, None, ConvQuantization(np.ones(2, np.float32), 1.0))
    got = convolve(
        weights, ConvInput(np.full((1, 6, 6, channels), value, np.float32)), ThreadPool(2)
    )
    sums = 127 * value * channels * 9
    np.testing.assert_array_equal(got[0, 2, 2], np.float32([sums, -sums]))


def test_a_fused_silu_is_the_plain_one_but_for_ties(isa: str) -> None:
    given = problem(Case((70, 40), 24, 9, 10, 2, norm=True, silu=True, multiplier=True))
    got = convolve(given.pack(ConvMethod.WINOGRAD2), given.given, ThreadPool(2), given.epilogue)
    step = np.float32(given.quantization.input_scale) * given.quantization.scales
    steps = np.abs(got - given.want) / step  # an input beside a tie moves an output by a weight
    assert (steps < 0.01).mean() > 0.9
    assert steps.max() <= 4 * 127


@pytest.mark.parametrize(("case", "method"), methods(CASES[2:5] + CASES[6:11]), ids=str)
def test_a_result_does_not_depend_on_batch_threads_or_cut(
    isa: str, case: Case, method: ConvMethod
) -> None:
    given = problem(replace(case, batch=3, silu=True))
    weights = given.pack(method)
    want = convolve(weights, given.given, ThreadPool(1), given.epilogue)
    for threads, cut in (
        (2, ConvCut()),
        (3, ConvCut(band_rows=2 if method else 1, unit_tiles=1)),
        (2, ConvCut(band_rows=4 if method else 3, unit_tiles=2)),
    ):
        got = convolve(weights, given.given, ThreadPool(threads), given.epilogue, cut)
        np.testing.assert_array_equal(got, want)

    def one(x: Floats | None, image: int) -> Floats | None:
        return None if x is None else np.ascontiguousarray(x[image : image + 1])

    for image in range(3):
        x, after = given.given, given.epilogue
        first = one(x.first, image)
        assert first is not None
        alone = ConvInput(
            first, one(x.second, image), one(x.scale, image), one(x.shift, image), x.silu
        )
        epilogue = ConvEpilogue(
            one(after.channel_add, image), one(after.residual, image), after.activation
        )
        got = convolve(weights, alone, ThreadPool(1), epilogue)
        np.testing.assert_array_equal(got[0], want[image])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("upsample", "method"), [(False, 0), (False, 1), (True, 1)])
def test_what_is_not_finite_reaches_the_outputs_that_see_it(
    isa: str, value: float, upsample: bool, method: int
) -> None:
    given = problem(Case((40, 0), 20, 6, 7, upsample=upsample))
    weights = given.pack(ConvMethod(method))
    given.given.first[0, 2, 3, 17] = value
    got = convolve(weights, given.given, ThreadPool(2))
    touched = np.zeros(got.shape[1:3], bool)
    if upsample:
        touched[3:7, 5:9] = True
    else:
        touched[1:4, 2:5] = True
    np.testing.assert_array_equal(np.isnan(got[0]).all(-1), touched)
    np.testing.assert_array_equal(np.isnan(got[0]).any(-1), touched)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    shape = conv_shape((8, 0), 8, 3, weights=ConvWeights.INT8)
    packed = np.zeros(shape.packed_bytes, np.uint8)
    with pytest.raises(ValueError, match="codes"):
        pack_conv(shape, np.zeros((8, 8, 3, 3), np.float32), packed, ThreadPool(1))
    with pytest.raises(ValueError, match="positive scale"):
        packed_conv(shape, packed)
    with pytest.raises(ValueError, match="positive scale"):
        packed_conv(shape, packed, None, ConvQuantization(np.ones(8, np.float32), 0.0))
    with pytest.raises(ValueError, match="multiplier"):
        packed_conv(
            shape,
            packed,
            None,
            ConvQuantization(np.ones(8, np.float32), 1.0, np.ones(9, np.float32)),
        )
    direct = conv_shape((8, 0), 8, 3)
    with pytest.raises(ValueError, match="integer convolution"):
        pack_conv_codes(
            direct,
            np.zeros((8, 8, 3, 3), np.int8),
            np.zeros(direct.packed_bytes, np.uint8),
            ThreadPool(1),
        )
    with pytest.raises(ValueError, match="65536"):
        conv_shape((8000, 0), 8, 3, weights=ConvWeights.INT8)
    with pytest.raises(ValueError, match="32768"):
        conv_shape((4000, 0), 8, 3, method=ConvMethod.WINOGRAD2, weights=ConvWeights.INT8)
