"""GPTQ against Optimal Brain Quantization, of which it is a fast form."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.errors import InvalidRequestError
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.gptq import column_order, gptq
from fuserve.quantization.rounding import fit_grid, rounded_values

DAMPING = 0.01


def inputs(cols: int, seed: int = 0, rows: int = 400) -> np.ndarray:
    """Correlated rows, some features much larger than others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) / cols**0.5
    sizes = np.exp(rng.standard_normal(cols))
    return ((rng.standard_normal((rows, cols)) @ mix) * sizes).astype(np.float32)


def slow_obq(
    weights: np.ndarray, hessian: np.ndarray, scheme: QuantScheme, act_order: bool
) -> np.ndarray:
    """Column after column: round it, and move the rest to where the outputs' error is least.

    The inverse Hessian of the columns that are left is computed anew for each (paper, section 3,
    equation 2), in float64.
    """
    cols = weights.shape[1]
    size = scheme.group_size or cols
    damped = hessian.astype(np.float64) + np.eye(cols) * DAMPING * np.diagonal(hessian).mean()
    work = weights.astype(np.float64)
    left = list(np.argsort(-np.diagonal(hessian), kind="stable") if act_order else range(cols))
    static = fit_grid(weights, scheme)
    out = np.empty_like(work)
    while left:
        column = left[0]
        group = column // size
        if act_order:
            grid = static.columns(group)
        elif column % size == 0:
            grid = fit_grid(work[:, column : column + size].astype(np.float32), scheme)
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        current = work[:, column : column + 1].astype(np.float32)
        out[:, column] = grid.values(grid.nearest(current))[:, 0]
        error = (work[:, column] - out[:, column]) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        left.pop(0)
    return out


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize(
    "scheme",
    (QuantScheme(4, 32), QuantScheme(4, 64, symmetric=False), QuantScheme(8)),
    ids=QuantScheme.describe,
)
def test_the_fast_form_rounds_as_the_slow_one(scheme: QuantScheme, act_order: bool) -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((6, 192)).astype(np.float32)
    x = inputs(192)
    hessian = x.T @ x
    order = column_order(hessian, damping=DAMPING, act_order=act_order)
    values = QuantizedLinear(scheme, gptq(weights, order, scheme)).values()
    want = slow_obq(weights, hessian, scheme, act_order)
    # A weight in the middle between two codes may go either way, and the rest follows it; so what
    # is compared is nearly all of the weights, and how good the outputs are.
    assert (np.abs(values - want) < 1e-4).mean() > 0.97
    errors = [np.square(x @ (one - weights).T).sum() for one in (values, want)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_outputs_change_less_than_by_rounding_to_nearest() -> None:
    rng = np.random.default_rng(3)
    scheme = QuantScheme(4, 64, symmetric=False)
    weights = rng.standard_normal((32, 256)).astype(np.float32)
    x = inputs(256)
    plain = np.square(x @ (rounded_values(weights, scheme) - weights).T).sum()
    for act_order in (False, True):
        order = column_order(x.T @ x, damping=DAMPING, act_order=act_order)
        values = QuantizedLinear(scheme, gptq(weights, order, scheme)).values()
        assert np.square(x @ (values - weights).T).sum() < 0.7 * plain


def test_features_that_are_always_zero_do_no_harm() -> None:
    weights = np.random.default_rng(4).standard_normal((4, 64)).astype(np.float32)
    x = inputs(64)
    x[:, 10:20] = 0
    scheme = QuantScheme(4, 32)
    order = column_order(x.T @ x, damping=DAMPING, act_order=True)
    values = QuantizedLinear(scheme, gptq(weights, order, scheme)).values()
    assert np.isfinite(values).all()
    assert (values[:, 10:20] == 0).all()


def test_what_cannot_be_inverted_is_refused() -> None:
    hessian = np.full((32, 32), np.nan, np.float32)
    with pytest.raises(InvalidRequestError, match="calibrate on more text"):
        column_order(hessian, damping=DAMPING, act_order=False)
    with pytest.raises(InvalidRequestError, match="must be positive"):
        column_order(np.eye(32, dtype=np.float32), damping=0.0, act_order=False)
