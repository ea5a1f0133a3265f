"""Packed linears against float64, in every format, at sizes that fit no tile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve import _native
from fuserve._native import PackedLinear, ThreadPool
from fuserve.kernels.linear import Codes, Storage, WeightFormat, linear, pack_codes, pack_floats

FLOAT_STORAGES = [Storage(f) for f in (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16)]
INTEGER_STORAGES = [
    *(Storage(WeightFormat.Q8, group) for group in (0, 32, 64, 128)),
    *(Storage(WeightFormat.Q4, group) for group in (0, 32, 64, 128)),
    *(Storage(WeightFormat.Q4_ASYMMETRIC, group) for group in (0, 32, 64, 128)),
]
STORAGES = FLOAT_STORAGES + INTEGER_STORAGES
AWKWARD = [(1, 1), (16, 32), (17, 33), (50, 130), (31, 257), (97, 576)]
# Largest weight error over the largest weight: half a step of each grid.
ROUNDING = {
    WeightFormat.F32: 0.0,
    WeightFormat.F16: 2**-11,
    WeightFormat.BF16: 2**-8,
    WeightFormat.Q8: 0.5 / 127 + 1e-3,
    WeightFormat.Q4: 1.02 / 8,  # the extreme opposite to the one that reaches -8 is clipped at 7
    WeightFormat.Q4_ASYMMETRIC: 1.02 / 15,
}


def packed(
    weights: npt.NDArray[np.float32],
    storage: Storage,
    *,
    bias: npt.NDArray[np.float32] | None = None,
    float_activations: bool = False,
    row_group: int = 0,
) -> tuple[PackedLinear, int]:
    shape = storage.shape(*weights.shape, row_group)
    data = np.full(shape.packed_bytes, 0xA5, np.uint8)
    pack_floats(shape, weights, data, ThreadPool(1))
    return PackedLinear(shape, data, bias, float_activations), shape.tiles * 16


def unpacked(isa: str, weights: PackedLinear, rows: int, cols: int) -> npt.NDArray[np.float64]:
    out = np.full((rows, cols), np.nan, np.float32)
    for row in range(rows):
        _native.unpack_row(isa, weights, row, out[row])
    return out.astype(np.float64)


def draw(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(got: npt.NDArray[np.generic], want: npt.NDArray[np.float64]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("storage", STORAGES, ids=Storage.describe)
@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_packing_rounds_each_weight_to_the_nearest_point_of_its_grid(
    isa: str, storage: Storage, rows: int, cols: int
) -> None:
    weights = draw(rows * cols, rows, cols)
    handle, _ = packed(weights, storage)
    error = np.abs(unpacked(isa, handle, rows, cols) - weights).max() / np.abs(weights).max()
    assert error <= ROUNDING[storage.format]


@pytest.mark.parametrize("storage", STORAGES, ids=Storage.describe)
@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_a_product_in_floats_equals_float64_over_the_unpacked_weights(
    isa: str, storage: Storage, rows: int, cols: int
) -> None:
    handle, width = packed(draw(1, rows, cols), storage, float_activations=True)
    reference = unpacked(isa, handle, rows, cols)
    for num_tokens in (1, 2, 5, 13, 27):
        x = draw(num_tokens, num_tokens, cols)
        got = linear(handle, width, x, ThreadPool(1))[:, :rows]
        assert relative_error(got, x.astype(np.float64) @ reference.T) < 2e-6 * max(1, cols**0.5)


@pytest.mark.parametrize("storage", INTEGER_STORAGES, ids=Storage.describe)
@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_an_integer_product_equals_float64_over_rounded_activations(
    isa: str, storage: Storage, rows: int, cols: int
) -> None:
    handle, width = packed(draw(2, rows, cols), storage)
    reference = unpacked(isa, handle, rows, cols)
    x = draw(3, 11, cols)
    rounded = np.zeros_like(x, np.float64)
    for first in range(0, cols, 32):
        block = x[:, first : first + 32]
        scale = np.abs(block).max(axis=1, keepdims=True) / 127
        rounded[:, first : first + 32] = np.rint(block / scale) * scale
    got = linear(handle, width, x, ThreadPool(1))[:, :rows]
    # A value halfway between two codes may round either way in fp32: allow one such step.
    tolerance = 2e-5 * max(1, cols**0.5) + np.abs(reference).max() * np.abs(x).max() / 127
    assert np.abs(got - rounded @ reference.T).max() < tolerance
    assert relative_error(got, x.astype(np.float64) @ reference.T) < 0.03


@given(
    storage=st.sampled_from(STORAGES),
    num_tokens=st.integers(1, 40),
    rows=st.integers(1, 80),
    cols=st.integers(1, 300),
    num_threads=st.integers(1, 3),
    cut=st.integers(0, 40),
    float_activations=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_row_of_a_product_never_depends_on_its_neighbours(
    storage: Storage,
    num_tokens: int,
    rows: int,
    cols: int,
    num_threads: int,
    cut: int,
    float_activations: bool,
) -> None:
    handle, width = packed(draw(rows, rows, cols), storage, float_activations=float_activations)
    x = draw(cols, num_tokens, cols)
    whole = linear(handle, width, x, ThreadPool(num_threads))
    cut = min(cut, num_tokens)
    parts = [linear(handle, width, p, ThreadPool(1)) for p in (x[:cut], x[cut:]) if len(p)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[-1:], linear(handle, width, x[-1:], ThreadPool(1)))


@pytest.mark.parametrize("storage", STORAGES, ids=Storage.describe)
def test_all_instruction_sets_agree_within_rounding(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, width = packed(draw(4, 45, 300), storage)
    x = draw(5, 9, 300)
    results = []
    for name in _native.available_isas():
        monkeypatch.setenv("FUSERVE_ISA", name)
        results.append(linear(handle, width, x, ThreadPool(2)))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=2e-4, atol=2e-4)


def test_the_largest_codes_do_not_overflow(isa: str) -> None:
    cols = 256
    for storage in INTEGER_STORAGES:
        for sign in (1, -1):
            weights = np.full((16, cols), sign, np.float32)
            weights[:, ::7] = -sign
            handle, width = packed(weights, storage)
            x = np.where(weights[:3] > 0, 5.0, -5.0).astype(np.float32)
            want = x.astype(np.float64) @ unpacked(isa, handle, 16, cols).T
            assert relative_error(linear(handle, width, x, ThreadPool(1)), want) < 1e-5


def test_heads_start_on_tiles_of_their_own_and_the_padding_is_zero(isa: str) -> None:
    heads, head_dim, cols = 3, 10, 40
    weights = draw(6, heads * head_dim, cols)
    bias = np.zeros((heads, 16), np.float32)
    bias[:, :head_dim] = draw(7, heads, head_dim)
    handle, width = packed(
        weights, Storage(WeightFormat.F32), bias=bias.reshape(-1), row_group=head_dim
    )
    x = draw(8, 4, cols)
    got = linear(handle, width, x, ThreadPool(1)).reshape(4, heads, 16)
    want = x.astype(np.float64) @ weights.T.astype(np.float64)
    want = want.reshape(4, heads, head_dim) + bias[:, :head_dim]
    assert relative_error(got[:, :, :head_dim], want) < 1e-5
    assert not got[:, :, head_dim:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("storage", STORAGES, ids=Storage.describe)
def test_a_row_that_is_not_finite_stays_so_and_spares_its_neighbours(
    isa: str, storage: Storage, value: float
) -> None:
    handle, width = packed(draw(9, 20, 70), storage)
    x = draw(10, 5, 70)
    clean = linear(handle, width, x, ThreadPool(1))
    x[2, 33] = value
    got = linear(handle, width, x, ThreadPool(1))
    assert not np.isfinite(got[2, :20]).any()
    others = [0, 1, 3, 4]
    assert np.array_equal(got[others], clean[others])


@pytest.mark.parametrize(
    ("storage", "highest", "offset"),
    [
        (Storage(WeightFormat.Q8, 32), 255, 0),
        (Storage(WeightFormat.Q4, 64), 15, 8),
        (Storage(WeightFormat.Q4_ASYMMETRIC, 32), 15, 0),
        (Storage(WeightFormat.Q4, 0), 15, 8),
        (Storage(WeightFormat.Q4_ASYMMETRIC, 0), 15, 0),
    ],
)
def test_codes_of_a_quantized_checkpoint_are_kept_bit_for_bit(
    isa: str, storage: Storage, highest: int, offset: int
) -> None:
    rng = np.random.default_rng(11)
    rows, cols = 21, 192
    groups = cols // (storage.group_size or cols)
    codes = rng.integers(0, highest, (rows, cols), np.uint8, endpoint=True)
    codes[codes == 128] = 0  # int8 grids are symmetric
    scales = rng.random((rows, groups)).astype(np.float16).astype(np.float32)
    minimums = None
    if storage.format == WeightFormat.Q4_ASYMMETRIC:
        minimums = -rng.random((rows, groups)).astype(np.float16).astype(np.float32)
    shape = storage.shape(rows, cols)
    data = np.zeros(shape.packed_bytes, np.uint8)
    pack_codes(shape, Codes(codes, scales, minimums), data, ThreadPool(2))
    signed = codes.view(np.int8) if storage.format == WeightFormat.Q8 else codes
    values = signed.astype(np.float32) - np.float32(offset)
    want = values * np.repeat(scales, cols // groups, axis=1)
    if minimums is not None:
        want = want + np.repeat(minimums, cols // groups, axis=1)
    handle = PackedLinear(shape, data, None, False)
    np.testing.assert_allclose(unpacked(isa, handle, rows, cols), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((9, 4, 4, 0), "unknown weight format"),
        ((3, 0, 4, 0), "must be positive"),
        ((3, 4, 4, 33), "group must be"),
        ((0, 10, 4, 0, 3), "multiple of row_group"),
    ],
)
def test_impossible_shapes_are_refused(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _native.LinearShape(*arguments)
