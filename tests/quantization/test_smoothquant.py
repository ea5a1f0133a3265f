"""SmoothQuant's formula, its searches, and what they rescue."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.quantization import QuantScheme
from fuserve.quantization.rounding import rounded_values
from fuserve.quantization.smoothquant import (
    ALPHAS,
    Smoothing,
    channel_shift,
    rounding_error,
    search_input_scale,
    search_smoothing,
    smoothing_of,
)
from fuserve.quantization.statistics import InputObserver, InputStatistics

TOKEN = QuantScheme(8, activations="token")
TENSOR = QuantScheme(8, activations="tensor")


def seen(rows: np.ndarray) -> InputStatistics:
    observer = InputObserver(rows.shape[1], len(rows), with_hessian=False)
    for start in range(0, len(rows), 100):
        observer.add(rows[start : start + 100])
    return observer.result()


def planted(shifted: bool = False) -> np.ndarray:
    """Inputs with a few features 20 to 60 times larger, as the LLM.int8() paper describes."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 96)).astype(np.float32)
    rows[:, [7, 33, 80]] *= np.array([20, 40, 60], np.float32)
    if shifted:
        rows[:, 50] = rows[:, 50] * 0.5 + 600
    return rows


@pytest.fixture
def matrices() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((24, 96)).astype(np.float32) / 10 for _ in range(2)]


def slow_error(
    x: np.ndarray, matrices: list[np.ndarray], scheme: QuantScheme, smoothing: np.ndarray
) -> float:
    """Round inputs and weights to int8 element by element, multiply, compare."""
    smooth = x / smoothing
    total = 0.0
    for matrix in matrices:
        weights = matrix * smoothing
        want = x.astype(np.float64) @ matrix.T
        got = np.zeros_like(want)
        for t, row in enumerate(smooth):
            step = (np.abs(row) if scheme.activations == "token" else np.abs(smooth)).max() / 127
            codes = np.round(row / step)
            for o, out in enumerate(weights):
                width = float(np.float16(np.abs(out).max() / 127))
                got[t, o] = (codes * np.round(out / width)).sum() * step * width
        total += np.square(got - want).sum()
    return total


def test_alpha_divides_the_difficulty_as_the_paper_says() -> None:
    inputs, weights = np.array([16.0, 1.0], np.float32), np.array([0.25, 4.0], np.float32)
    np.testing.assert_allclose(smoothing_of(0.5, inputs, weights), [8.0, 0.5])
    np.testing.assert_allclose(smoothing_of(1.0, inputs, weights), inputs)
    np.testing.assert_allclose(smoothing_of(0.0, inputs, weights), 1 / weights)


@pytest.mark.parametrize("scheme", (TOKEN, TENSOR), ids=("token", "tensor"))
def test_the_tried_error_is_that_of_integer_arithmetic(
    scheme: QuantScheme, matrices: list[np.ndarray]
) -> None:
    x = planted()[:40]
    smoothing = smoothing_of(0.5, np.abs(x).max(axis=0), np.abs(matrices[0]).max(axis=0))
    want = slow_error(x, matrices, scheme, smoothing)
    assert rounding_error(matrices, scheme, seen(x), smoothing) == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("scheme", (TOKEN, TENSOR), ids=("token", "tensor"))
def test_the_search_finds_the_best_alpha_and_rescues_planted_outliers(
    scheme: QuantScheme, matrices: list[np.ndarray]
) -> None:
    inputs = seen(planted())
    found = search_smoothing(matrices, scheme, inputs, Smoothing())
    assert found is not None
    widest = np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0)
    tried = [smoothing_of(alpha, inputs.largest, widest) for alpha in ALPHAS]
    best = min(rounding_error(matrices, scheme, inputs, one) for one in tried)
    assert rounding_error(matrices, scheme, inputs, found) == pytest.approx(best, rel=1e-4)
    naive = rounding_error(matrices, scheme, inputs, np.ones(96, np.float32))
    assert best < naive / 10


def test_even_inputs_are_left_alone(matrices: list[np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    x = rng.choice(np.array([-1, 1], np.float32), (300, 96))
    assert search_smoothing(matrices, TOKEN, seen(x), Smoothing()) is None


def test_pieces_are_at_least_as_good_as_one_alpha(matrices: list[np.ndarray]) -> None:
    inputs = seen(planted())
    errors = []
    for pieces in (1, 3):
        found = search_smoothing(matrices, TENSOR, inputs, Smoothing(pieces=pieces))
        assert found is not None
        errors.append(rounding_error(matrices, TENSOR, inputs, found))
    assert errors[1] < errors[0]


def test_a_shift_evens_out_a_lopsided_feature(matrices: list[np.ndarray]) -> None:
    inputs = seen(planted(shifted=True))
    shift = channel_shift(inputs)
    moved = inputs.transformed(shift, None)
    np.testing.assert_allclose(moved.low, -moved.high, atol=1e-4)
    ones = np.ones(96, np.float32)
    assert rounding_error(matrices, TENSOR, moved, ones) < 0.6 * rounding_error(
        matrices, TENSOR, inputs, ones
    )


def test_features_of_one_source_are_smoothed_and_shifted_alike(
    matrices: list[np.ndarray],
) -> None:
    inputs = seen(planted(shifted=True))
    share = np.arange(96) % 48
    shift = channel_shift(inputs, share)
    found = search_smoothing(
        matrices, TOKEN, inputs.transformed(shift, None), Smoothing(alpha=0.5), share
    )
    assert found is not None
    np.testing.assert_array_equal(found[:48], found[48:])
    np.testing.assert_array_equal(shift[:48], shift[48:])


def test_the_static_step_clips_where_that_changes_outputs_least(
    matrices: list[np.ndarray],
) -> None:
    x = np.random.default_rng(4).standard_t(3, (400, 96)).astype(np.float32)
    inputs = seen(x)
    scale = search_input_scale(matrices, TENSOR, inputs)
    widest = float(inputs.largest.max()) / 127
    assert scale < widest

    def error(step: float) -> float:
        rounded = np.clip(np.round(inputs.sample / step), -127, 127) * step
        return sum(
            float(np.square(rounded @ rounded_values(m, TENSOR).T - inputs.sample @ m.T).sum())
            for m in matrices
        )

    assert error(scale) < error(widest)
    assert all(error(scale) <= error(widest * clip) * 1.001 for clip in (0.5, 0.6, 0.8, 0.95))


def test_statistics_do_not_depend_on_how_the_rows_come() -> None:
    x = planted()
    whole = InputObserver(96, len(x), with_hessian=True)
    whole.add(x)
    pieces = InputObserver(96, len(x), with_hessian=True)
    for start in (0, 13, 170):
        pieces.add(x[start : {0: 13, 13: 170, 170: 400}[start]])
    one, other = whole.result(), pieces.result()
    np.testing.assert_array_equal(one.sample, other.sample)
    np.testing.assert_array_equal(one.largest, other.largest)
    assert one.hessian is not None and other.hessian is not None
    np.testing.assert_allclose(one.hessian, 2 / 400 * x.T @ x, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(one.hessian, other.hessian, rtol=1e-3, atol=1e-2)
