"""AWQ against a plain statement of its two searches."""

from __future__ import annotations

from itertools import product

import numpy as np

from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.awq import RATIOS, SHRINKS, awq_smoothing, clipped_codes
from fuserve.quantization.rounding import fit_grid, rounded_values
from fuserve.quantization.statistics import InputObserver, InputStatistics

SCHEME = QuantScheme(4, 32, symmetric=False)


def seen(rows: np.ndarray) -> InputStatistics:
    observer = InputObserver(rows.shape[1], len(rows), with_hessian=True)
    observer.add(rows)
    return observer.result()


def salient_inputs(cols: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, cols)).astype(np.float32)
    rows[:, 5] *= 30
    rows[:, 40] *= 12
    return rows


def test_the_scale_is_the_power_of_the_magnitudes_with_the_least_error() -> None:
    x = salient_inputs()
    rng = np.random.default_rng(1)
    matrices = [rng.standard_normal((16, 64)).astype(np.float32) for _ in range(2)]
    stacked = np.abs(np.concatenate(matrices)).reshape(32, 2, 32)
    relative = (stacked / stacked.max(axis=2, keepdims=True)).mean(axis=0).reshape(64)
    errors = []
    for ratio, weighed in product(RATIOS, (False, True)):
        scale = np.abs(x).mean(axis=0) ** ratio
        if weighed:
            scale = scale / relative ** (1 - ratio)
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        error = 0.0
        for matrix in matrices:
            rounded = rounded_values(matrix * scale, SCHEME)
            error += np.square((x / scale) @ rounded.T - x @ matrix.T).sum()
        errors.append((error, ratio, scale))
    best_error, best_ratio, best = min(errors, key=lambda one: one[0])
    assert best_ratio > 0
    found = awq_smoothing(matrices, SCHEME, seen(x))
    assert found is not None
    np.testing.assert_allclose(found, best, rtol=1e-3)
    assert best_error < 0.6 * errors[0][0]


def test_features_that_share_a_source_get_one_scale() -> None:
    x = salient_inputs()
    matrix = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
    share = np.concatenate([np.arange(32), np.arange(32)])
    found = awq_smoothing([matrix], SCHEME, seen(x), share)
    assert found is not None
    np.testing.assert_array_equal(found[:32], found[32:])


def test_each_group_is_clipped_where_its_own_error_is_least() -> None:
    x = salient_inputs()
    weights = np.random.default_rng(5).standard_t(3, (12, 64)).astype(np.float32)
    values = QuantizedLinear(SCHEME, clipped_codes(weights, SCHEME, seen(x))).values()
    clipped = 0
    for row in range(len(weights)):
        for start in (0, 32):
            part, group = x[:, start : start + 32], weights[row : row + 1, start : start + 32]
            tried = [rounded_values(group, SCHEME, fit_grid(group, SCHEME, s)) for s in SHRINKS]
            errors = [np.square(part @ (one - group).T).sum() for one in tried]
            mine = np.square(part @ (values[row, start : start + 32] - group[0])).sum()
            assert mine <= min(errors) * 1.001
            clipped += int(np.argmin(errors) > 0)
    assert clipped > 6
