"""W8A8 and LLM.int8() against integer arithmetic in numpy, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve import _native
from fuserve._native import ThreadPool
from fuserve.kernels.linear import (
    Codes,
    InputKind,
    LinearInput,
    Storage,
    WeightFormat,
    linear,
    pack_codes,
    pack_floats,
    packed_linear,
)

Floats = npt.NDArray[np.float32]

STORAGE = Storage(WeightFormat.Q8_CHANNEL)
AWKWARD = [(1, 1), (16, 32), (17, 33), (50, 131), (31, 257), (97, 576), (113, 1031)]
TOKEN = LinearInput(InputKind.TOKEN)
FIXED = LinearInput(InputKind.FIXED, scale=0.02)
OUTLIERS = LinearInput(InputKind.OUTLIERS, threshold=2.5)
KINDS = {"token": TOKEN, "fixed": FIXED, "outliers": OUTLIERS}


@dataclass(frozen=True)
class Matrix:
    """Random int8 codes with a scale a row, packed and as they are."""

    codes: npt.NDArray[np.int8]
    scales: Floats

    @classmethod
    def draw(cls, rows: int, cols: int, seed: int = 0) -> Matrix:
        rng = np.random.default_rng(seed + 1000 * rows + cols)
        codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
        return cls(codes, rng.random((rows, 1), np.float32) / 100)

    def product(self, x: Floats, given: LinearInput, threads: int = 1) -> Floats:
        rows, cols = self.codes.shape
        shape = STORAGE.shape(rows, cols)
        packed = np.full(shape.packed_bytes, 0xA5, np.uint8)
        pack_codes(shape, Codes(self.codes.view(np.uint8), self.scales), packed, ThreadPool(1))
        handle = packed_linear(shape, packed, None, given)
        return linear(handle, shape.tiles * 16, x, ThreadPool(threads))[:, :rows]


def draw(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def quantized(x: Floats, given: LinearInput) -> tuple[npt.NDArray[np.int32], Floats, Floats]:
    """What the issue's arithmetic makes of rows: integers, their scales, what stays fp32."""
    outliers = np.zeros_like(x)
    if given.kind == InputKind.OUTLIERS:
        unit = np.minimum(1, np.sqrt(np.square(x).mean(axis=1, keepdims=True)))
        outliers = np.where(np.abs(x) > given.threshold * unit, x, np.float32(0))
        x = x - outliers
    if given.kind == InputKind.FIXED:
        scales = np.full((len(x), 1), given.scale, np.float32)
        inverse = np.float32(1) / scales
    else:
        largest = np.abs(x).max(axis=1, keepdims=True)
        scales = largest * (np.float32(1) / np.float32(127))
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.clip(np.rint(x * inverse), -127, 127).astype(np.int32)
    return q, scales, outliers


def reference(matrix: Matrix, x: Floats, given: LinearInput) -> Floats:
    """An exact integer product, scaled in fp32.  # [tokens, rows]"""
    q, scales, _ = quantized(x, given)
    sums = q @ matrix.codes.astype(np.int32).T
    return sums.astype(np.float32) * (scales * matrix.scales.T)


@pytest.mark.parametrize("name", ["token", "fixed"])
@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_a_product_is_that_of_integers_bit_for_bit(
    isa: str, name: str, rows: int, cols: int
) -> None:
    matrix = Matrix.draw(rows, cols)
    for num_tokens in (1, 2, 3, 7, 12, 13, 29):
        x = draw(num_tokens, num_tokens, cols)
        got = matrix.product(x, KINDS[name])
        assert np.array_equal(got, reference(matrix, x, KINDS[name]))


@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_without_outliers_llm_int8_is_w8a8_bit_for_bit(isa: str, rows: int, cols: int) -> None:
    matrix = Matrix.draw(rows, cols)
    x = draw(5, 14, cols)
    given = LinearInput(InputKind.OUTLIERS, threshold=100.0)
    assert np.array_equal(matrix.product(x, given), matrix.product(x, TOKEN))


@pytest.mark.parametrize("threshold", [0.01, 1.0, 2.5])
@pytest.mark.parametrize(("rows", "cols"), AWKWARD)
def test_outliers_are_multiplied_in_float_and_the_rest_in_integers(
    isa: str, threshold: float, rows: int, cols: int
) -> None:
    matrix = Matrix.draw(rows, cols)
    given = LinearInput(InputKind.OUTLIERS, threshold=threshold)
    for num_tokens in (1, 5, 31):
        x = draw(num_tokens, num_tokens, cols)
        x[:, cols // 2] *= 40
        _, _, outliers = quantized(x, given)
        values = matrix.codes.astype(np.float64) * matrix.scales
        want = reference(matrix, x, given) + outliers.astype(np.float64) @ values.T
        got = matrix.product(x, given)
        # Rounding in fp32 is relative to the sums' terms, not to what is left of them.
        terms = np.abs(outliers.astype(np.float64)) @ np.abs(values).T + np.abs(want)
        assert (np.abs(got - want) <= 1e-6 * terms + 1e-12).all()


@given(
    name=st.sampled_from(sorted(KINDS)),
    num_tokens=st.integers(1, 60),
    rows=st.integers(1, 150),
    cols=st.integers(1, 300),
    num_threads=st.integers(1, 3),
    cut=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_a_row_never_depends_on_its_neighbours(
    name: str, num_tokens: int, rows: int, cols: int, num_threads: int, cut: int
) -> None:
    matrix = Matrix.draw(rows, cols)
    x = draw(cols, num_tokens, cols)
    x[::3, :: max(1, cols // 5)] *= 30
    whole = matrix.product(x, KINDS[name], num_threads)
    cut = min(cut, num_tokens)
    parts = [matrix.product(part, KINDS[name]) for part in (x[:cut], x[cut:]) if len(part)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[-1:], matrix.product(x[-1:], KINDS[name]))


@pytest.mark.parametrize("name", ["token", "fixed"])
def test_all_instruction_sets_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = Matrix.draw(75, 333)
    x = draw(6, 17, 333)
    results = []
    for isa in _native.available_isas():
        monkeypatch.setenv("FUSERVE_ISA", isa)
        results.append(matrix.product(x, KINDS[name], threads=2))
    for other in results[1:]:
        assert np.array_equal(other, results[0])


def test_the_longest_sums_of_the_largest_products_are_exact(isa: str) -> None:
    cols = 40_000
    for sign in (1, -1):
        codes = np.full((3, cols), 127 * sign, np.int8)
        codes[:, ::7] = -127 * sign
        matrix = Matrix(codes, np.ones((3, 1), np.float32))
        x = np.where(codes[:1] > 0, 1.0, -1.0).astype(np.float32)
        assert np.array_equal(matrix.product(x, TOKEN), reference(matrix, x, TOKEN))


@pytest.mark.parametrize("most", [64, 65, 127])
def test_neighbours_that_overflow_16_bits_together_are_exact(isa: str, most: int) -> None:
    # Bytes of 255 and 1 times pairs and fours that sum to 128, just more, and all there is.
    rng = np.random.default_rng(most)
    codes = rng.choice(np.array([-127, 127], np.int8), (48, 100))
    matrix = Matrix(codes, np.ones((48, 1), np.float32))
    values = np.array([-most, -64, -63, -1, 0, 1, 2, 63, 64, most], np.float32)
    dense = rng.choice(values, (120, 100))
    sparse = np.where(rng.random((120, 100)) < 0.1, dense, 0).astype(np.float32)
    whole = LinearInput(InputKind.FIXED, scale=1.0)
    for x in (dense, sparse, np.full((5, 100), most, np.float32)):
        assert np.array_equal(matrix.product(x, whole), reference(matrix, x, whole))


def test_shift_and_multiplier_come_before_the_rounding(isa: str) -> None:
    matrix = Matrix.draw(20, 70)
    x, shift, multiplier = draw(1, 5, 70), draw(2, 70), np.exp(draw(3, 70))
    for name, kind in KINDS.items():
        given = LinearInput(kind.kind, kind.scale, kind.threshold, shift, multiplier)
        prepared = (x - shift) * multiplier
        want = matrix.product(prepared, KINDS[name])
        assert np.array_equal(matrix.product(x, given), want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_is_not_finite_stays_so_and_spares_its_neighbours(
    isa: str, name: str, value: float
) -> None:
    matrix = Matrix.draw(20, 70)
    x = draw(10, 5, 70)
    clean = matrix.product(x, KINDS[name])
    x[2, 33] = value
    got = matrix.product(x, KINDS[name])
    assert not np.isfinite(got[2]).any()
    others = [0, 1, 3, 4]
    assert np.array_equal(got[others], clean[others])


def test_small_rows_have_their_outliers_in_proportion(isa: str) -> None:
    matrix = Matrix.draw(20, 70)
    x = draw(10, 3, 70) / 8
    x[:, 11] = 2.5
    small = x / 1024
    assert np.array_equal(matrix.product(small, OUTLIERS) * 1024, matrix.product(x, OUTLIERS))
    assert not np.array_equal(matrix.product(x, OUTLIERS), matrix.product(x, TOKEN))


def test_a_row_of_zeros_gives_zeros(isa: str) -> None:
    matrix = Matrix.draw(20, 70)
    x = np.zeros((3, 70), np.float32)
    for kind in KINDS.values():
        assert not matrix.product(x, kind).any()


def test_packing_rounds_to_nearest_and_unpacking_gives_it_back(isa: str) -> None:
    weights = draw(1, 50, 130)
    shape = STORAGE.shape(50, 130)
    packed = np.full(shape.packed_bytes, 0xA5, np.uint8)
    pack_floats(shape, weights, packed, ThreadPool(2))
    scales = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    want = np.rint(weights * (np.float32(1) / scales)) * scales
    handle = packed_linear(shape, packed, None, LinearInput(InputKind.FLOATS))
    got = np.full((50, 130), np.nan, np.float32)
    for row in range(50):
        _native.unpack_row(isa, handle, row, got[row])
    assert np.array_equal(got, want)
    x = draw(2, 13, 130)
    product = linear(handle, shape.tiles * 16, x, ThreadPool(1))[:, :50]
    np.testing.assert_allclose(product, x.astype(np.float64) @ want.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("storage", "given", "complaint"),
    [
        (Storage(WeightFormat.Q8, 32), TOKEN, "whole rows"),
        (Storage(WeightFormat.F32), OUTLIERS, "whole rows"),
        (STORAGE, LinearInput(), "whole rows"),
        (STORAGE, LinearInput(InputKind.FIXED), "must be positive"),
        (STORAGE, LinearInput(InputKind.OUTLIERS), "must be positive"),
        (STORAGE, LinearInput(InputKind.TOKEN, shift=np.zeros(3, np.float32)), "cols"),
    ],
)
def test_what_does_not_go_together_is_refused(
    storage: Storage, given: LinearInput, complaint: str
) -> None:
    shape = storage.shape(16, 32)
    packed = np.zeros(shape.packed_bytes, np.uint8)
    with pytest.raises(ValueError, match=complaint):
        packed_linear(shape, packed, None, given)


def test_grouped_weights_have_no_place_in_the_format() -> None:
    with pytest.raises(ValueError, match="no groups"):
        Storage(WeightFormat.Q8_CHANNEL, 32).shape(16, 64)
