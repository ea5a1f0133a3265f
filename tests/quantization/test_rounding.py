"""Round-to-nearest against a statement of it in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.rounding import round_to_nearest, rounded_values, unsigned_codes

SCHEMES = (
    QuantScheme(8),
    QuantScheme(8, 64),
    QuantScheme(8, 32, symmetric=False),
    QuantScheme(4, 32),
    QuantScheme(4, 64, symmetric=False),
    QuantScheme(4, 128, symmetric=False),
)


def slowly_rounded(weights: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    """Each weight at the nearest of its group's points, found by trying all of them."""
    rows, cols = weights.shape
    size = scheme.group_size or cols
    out = np.empty_like(weights)
    for row in range(rows):
        for start in range(0, cols, size):
            group = weights[row, start : start + size]
            points = _points(group, scheme)
            distance = np.abs(group[:, None].astype(np.float64) - points)
            out[row, start : start + size] = points[distance.argmin(axis=1)]
    return out


def _points(group: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    levels = 2**scheme.weight_bits - 1
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    if scheme.symmetric:
        half = 127 if scheme.weight_bits == 8 else 7.5
        scale = float(np.float16(max(high, -low) / half))
        codes = np.arange(-127, 128) if scheme.weight_bits == 8 else np.arange(-8, 8)
        return scale * codes.astype(np.float64)
    scale = float(np.float16((high - low) / levels))
    zero = round(-low / scale) if scale else 0
    return scale * (np.arange(levels + 1) - float(zero))


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.describe)
@pytest.mark.parametrize("cols", (128, 160))
def test_weights_go_to_the_nearest_point(scheme: QuantScheme, cols: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((5, cols)).astype(np.float32) + np.float32(0.3)
    layer = QuantizedLinear(scheme, round_to_nearest(weights, scheme))
    want = slowly_rounded(weights, scheme)
    np.testing.assert_allclose(layer.values(), want, atol=1e-5)
    np.testing.assert_allclose(rounded_values(weights, scheme), want, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.describe)
def test_groups_of_zeros_stay_zero(scheme: QuantScheme) -> None:
    weights = np.zeros((3, 128), np.float32)
    weights[1, :40] = 1e-12  # below what a float16 scale can say
    layer = QuantizedLinear(scheme, round_to_nearest(weights, scheme))
    assert (layer.values() == 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scheme=st.sampled_from(SCHEMES), spread=st.floats(0.01, 30))
def test_codes_and_zero_points_say_the_same_as_values(
    seed: int, scheme: QuantScheme, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((3, 128)) * spread).astype(np.float32)
    layer = QuantizedLinear(scheme, round_to_nearest(weights, scheme))
    codes, zeros = unsigned_codes(layer)
    size = scheme.group_size or 128
    signed = codes.astype(np.float32) - np.repeat(zeros, size, axis=1).astype(np.float32)
    want = signed * np.repeat(layer.codes.scales, size, axis=1)
    np.testing.assert_allclose(layer.values(), want, rtol=1e-5, atol=1e-5 * spread)


def test_some_outputs_of_a_layer_keep_their_numbers() -> None:
    rng = np.random.default_rng(1)
    scheme = QuantScheme(4, 32, symmetric=False)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    shift = np.arange(6, dtype=np.float32)
    layer = QuantizedLinear(scheme, round_to_nearest(weights, scheme), output_shift=shift)
    rows = np.array([4, 0, 5])
    np.testing.assert_array_equal(layer.take(rows).values(), layer.values()[rows])
    np.testing.assert_array_equal(layer.take(slice(2, 4)).output_shift, shift[2:4])
