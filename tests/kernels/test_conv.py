"""Convolutions against torch in float64, and against themselves in other cuts."""

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
    ConvWeights,
    conv_shape,
    convolve,
    pack_conv,
    packed_conv,
)
from tests.kernels.conv_case import ConvCase

Floats = npt.NDArray[np.float32]
DOWN = (0, 0, 1, 1)  # the VAE encoder's


@dataclass(frozen=True)
class Problem:
    """A case with its operands and what torch makes of them."""

    case: ConvCase
    filters: Floats
    bias: Floats | None
    given: ConvInput
    epilogue: ConvEpilogue
    want: npt.NDArray[np.float64]

    def pack(self, method: ConvMethod, half: bool = False) -> PackedConv:
        shape = self.case.shape(method, ConvWeights.FLOAT16 if half else ConvWeights.FLOAT32)
        packed = np.full(shape.packed_bytes, 255, np.uint8)
        pack_conv(shape, self.filters, packed, ThreadPool(2))
        return packed_conv(shape, packed, self.bias)

    def error(self, got: Floats) -> float:
        """The largest difference, as a part of the root mean square."""
        assert got.shape == self.want.shape
        return float(np.abs(got - self.want).max() / np.sqrt((self.want**2).mean()))


def problem(case: ConvCase) -> Problem:
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))

    def normal(*shape: int) -> Floats:
        return rng.standard_normal(shape, np.float32)

    image = (case.batch, case.height, case.width)
    total = sum(case.channels)
    filters = normal(case.out_channels, total, case.size, case.size)
    first, second = (normal(*image, c) if c else None for c in case.channels)
    assert first is not None
    scale = normal(case.batch, total) if case.norm else None
    shift = normal(case.batch, total) if case.norm else None
    bias = normal(case.out_channels) if case.bias else None
    channel_add = normal(case.batch, case.out_channels) if case.channel_add else None

    x = np.concatenate([first] if second is None else [first, second], axis=3)
    seen = torch.from_numpy(x).double()
    if scale is not None and shift is not None:
        seen = (
            seen * torch.from_numpy(scale)[:, None, None] + torch.from_numpy(shift)[:, None, None]
        )
    seen = (F.silu(seen) if case.silu else seen).permute(0, 3, 1, 2)
    if case.upsample:
        seen = F.interpolate(seen, scale_factor=2, mode="nearest")
    top, left, bottom, right = case.padding
    seen = F.pad(seen, (left, right, top, bottom))
    out = F.conv2d(seen, torch.from_numpy(filters).double(), stride=case.stride)
    out = out.permute(0, 2, 3, 1)
    residual = normal(*out.shape) if case.residual else None
    for term in (bias, None if channel_add is None else channel_add[:, None, None], residual):
        out = out if term is None else out + torch.from_numpy(term)
    functions = {ConvActivation.RELU: F.relu, ConvActivation.SILU: F.silu}
    out = functions[case.activation](out) if case.activation else out
    given = ConvInput(first, second, scale, shift, case.silu)
    epilogue = ConvEpilogue(channel_add, residual, case.activation)
    return Problem(case, filters, bias, given, epilogue, out.numpy())


WINOGRAD_CASES = [
    ConvCase((16, 0), 16, 8, 8),
    ConvCase((5, 0), 3, 7, 9, batch=2, padding=(0, 1, 1, 0)),
    ConvCase((320, 0), 48, 12, 20, norm=True, silu=True, channel_add=True),
    ConvCase((40, 24), 20, 9, 6, 2, norm=True, silu=True, channel_add=True, residual=True),
    ConvCase((3, 70), 33, 5, 30, residual=True, activation=ConvActivation.RELU),
    ConvCase((64, 0), 64, 1, 1, bias=False, activation=ConvActivation.SILU),
    ConvCase((300, 33), 17, 18, 3, norm=True),
    ConvCase((36, 0), 50, 30, 31, silu=True),  # more squares than are multiplied together
]
DIRECT_CASES = [
    *WINOGRAD_CASES,
    ConvCase((4, 0), 32, 9, 11, stride=2),
    ConvCase((40, 0), 16, 8, 10, batch=3, stride=2, padding=DOWN, norm=True, silu=True),
    ConvCase((33, 7), 19, 7, 5, stride=2, padding=DOWN, residual=True),
    ConvCase((48, 0), 40, 6, 7, 2, size=1, padding=(0, 0, 0, 0), norm=True, channel_add=True),
    ConvCase((320, 9), 21, 5, 3, size=1, padding=(0, 0, 0, 0), residual=True),
    ConvCase((20, 0), 32, 9, 8, size=1, stride=2, padding=(0, 0, 0, 0)),
]


@pytest.mark.parametrize("case", DIRECT_CASES, ids=str)
def test_direct_convolutions_equal_float64(isa: str, case: ConvCase) -> None:
    given = problem(case)
    got = convolve(given.pack(ConvMethod.DIRECT), given.given, ThreadPool(2), given.epilogue)
    assert given.error(got) <= 1e-5


UPSAMPLING_CASES = [
    ConvCase((24, 0), 24, 3, 5, upsample=True),
    ConvCase((70, 30), 18, 5, 4, 2, upsample=True, norm=True, silu=True, residual=True),
    ConvCase((33, 0), 35, 13, 11, upsample=True, channel_add=True),  # more than one chunk
    ConvCase((16, 0), 16, 1, 1, upsample=True),
]


@pytest.mark.parametrize("case", UPSAMPLING_CASES, ids=str)
def test_upsampling_convolutions_equal_float64(isa: str, case: ConvCase) -> None:
    given = problem(case)
    got = convolve(given.pack(ConvMethod.WINOGRAD2), given.given, ThreadPool(2), given.epilogue)
    assert given.error(got) <= 1e-5


WINOGRAD_ERRORS = {ConvMethod.WINOGRAD2: 1e-4, ConvMethod.WINOGRAD4: 1e-3}


@pytest.mark.parametrize("case", WINOGRAD_CASES, ids=str)
@pytest.mark.parametrize("method", WINOGRAD_ERRORS)
def test_winograd_convolutions_equal_float64(isa: str, case: ConvCase, method: ConvMethod) -> None:
    given = problem(case)
    got = convolve(given.pack(method), given.given, ThreadPool(2), given.epilogue)
    assert given.error(got) <= WINOGRAD_ERRORS[method] / 10


CUT_CASES = [(case, ConvMethod.DIRECT) for case in DIRECT_CASES[2:6] + DIRECT_CASES[8:]]
CUT_CASES += [(case, ConvMethod.WINOGRAD2) for case in UPSAMPLING_CASES[:3]]
CUT_CASES += [(case, method) for case in WINOGRAD_CASES[2:5] for method in WINOGRAD_ERRORS]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("case", "method"), CUT_CASES, ids=str)
def test_a_result_does_not_depend_on_batch_threads_or_cut(
    isa: str, case: ConvCase, method: ConvMethod, half: bool
) -> None:
    given = problem(replace(case, batch=3))
    weights = given.pack(method, half)
    want = convolve(weights, given.given, ThreadPool(1), given.epilogue)
    for threads, cut in (
        (2, ConvCut()),
        (3, ConvCut(band_rows=4, unit_tiles=1)),
        (2, ConvCut(band_rows=8, unit_tiles=2)),
    ):
        got = convolve(weights, given.given, ThreadPool(threads), given.epilogue, cut)
        np.testing.assert_array_equal(got, want)
    for image in range(3):
        got = convolve(weights, *image_of(given, image))
        np.testing.assert_array_equal(got[0], want[image])


def image_of(given: Problem, image: int) -> tuple[ConvInput, ThreadPool, ConvEpilogue]:
    """One image of a problem alone."""

    def one(x: Floats | None) -> Floats | None:
        return None if x is None else np.ascontiguousarray(x[image : image + 1])

    x, after = given.given, given.epilogue
    first = one(x.first)
    assert first is not None
    return (
        ConvInput(first, one(x.second), one(x.scale), one(x.shift), x.silu),
        ThreadPool(1),
        ConvEpilogue(one(after.channel_add), one(after.residual), after.activation),
    )


@pytest.mark.parametrize("method", [ConvMethod.DIRECT, *WINOGRAD_ERRORS])
def test_half_weights_are_the_rounded_ones(isa: str, method: ConvMethod) -> None:
    given = problem(ConvCase((48, 16), 24, 8, 10))
    whole = convolve(given.pack(method), given.given, ThreadPool(1))
    half = convolve(given.pack(method, half=True), given.given, ThreadPool(1))
    shares = np.abs(half - whole) / np.sqrt((whole**2).mean())
    assert 0 < shares.max() < 2e-3
    exact = replace(given, filters=given.filters.astype(np.float16).astype(np.float32))
    same = convolve(exact.pack(method), given.given, ThreadPool(1))
    np.testing.assert_array_equal(half, same)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="Winograd"):
        conv_shape((8, 0), 8, 3, stride=2, method=ConvMethod.WINOGRAD2)
    with pytest.raises(ValueError, match="upsampling"):
        conv_shape((8, 0), 8, 1, upsample=True)
    with pytest.raises(ValueError, match="upsampling needs"):
        conv_shape((8, 0), 8, 3, upsample=True)
    with pytest.raises(ValueError, match="needs floats"):
        conv_shape((8, 0), 8, 3, method=ConvMethod.WINOGRAD4, weights=ConvWeights.INT8)
    with pytest.raises(ValueError, match="size"):
        conv_shape((8, 0), 8, 5)
    weights = problem(ConvCase((8, 4), 8, 4, 4)).pack(ConvMethod.DIRECT)
    image = np.zeros((1, 4, 4, 8), np.float32)
    with pytest.raises(ValueError, match="as many sources"):
        convolve(weights, ConvInput(image), ThreadPool(1))
    with pytest.raises(ValueError, match="own channels"):
        convolve(weights, ConvInput(image, image), ThreadPool(1))
