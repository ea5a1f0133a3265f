"""GPTQ (arXiv 2210.17323): round column by column, the rest making up for each error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Codes
from fuserve.quantization.rounding import Grid, fit_grid, group_of
from fuserve.quantization.scheme import QuantScheme

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
BLOCK_COLS = 128
"""Columns whose errors are passed on to the rest together (the paper's lazy batches)."""


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """What matrices that read the same inputs share.

    Attributes:
        order: the columns as they are taken.  # [in]
        is_natural: whether they are taken from first to last.
        inverse: the upper Cholesky factor of the damped Hessian's inverse, in this order.
        unseen: columns whose inputs were always 0.  # [in]
    """

    order: npt.NDArray[np.intp]
    is_natural: bool
    inverse: Floats
    unseen: npt.NDArray[np.bool_]


def column_order(hessian: Floats, *, damping: float, act_order: bool) -> ColumnOrder:
    """Decide in which order columns are rounded.

    Args:
        hessian: proportional to ``X.T @ X`` of the inputs.  # [in, in]
        damping: added to the diagonal, as part of its mean.
        act_order: take the columns with the largest inputs first.

    Raises:
        InvalidRequestError: damping is not positive, or the Hessian cannot be inverted.
    """
    diagonal = np.diagonal(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    inverse = _inverse_factor(hessian[np.ix_(order, order)], damping)
    return ColumnOrder(order, not act_order, inverse, diagonal == 0)


def gptq(weights: Floats, inputs: ColumnOrder, scheme: QuantScheme) -> Codes:
    """Codes of a matrix such that its outputs, not its weights, change least.

    With columns out of their order, each group's grid is fitted to the original weights ("static
    groups"), so that groups stay runs of neighbours and nothing has to be reordered at run time.
    Otherwise a grid is fitted when its group's turn comes, to weights that have taken up the errors
    before it, as in the paper.

    Args:
        weights: ``[out, in]``.
        inputs: of the matrix.
        scheme: bits, groups, symmetry.
    """
    rows, cols = weights.shape
    order, inverse = inputs.order, inputs.inverse
    work = weights.astype(np.float32)  # a copy that takes up the errors
    work[:, inputs.unseen] = 0
    work = np.ascontiguousarray(work[:, order])
    groups = group_of(scheme, cols)[order]
    grid = fit_grid(weights, scheme)
    codes = np.empty((rows, cols), np.float32)
    for start in range(0, cols, BLOCK_COLS):
        stop = min(start + BLOCK_COLS, cols)
        errors = np.empty((rows, stop - start), np.float32)
        for i in range(start, stop):
            if inputs.is_natural and i % (scheme.group_size or cols) == 0:
                _refit(grid, work, i)
            point = grid.columns(groups[i])
            codes[:, i : i + 1] = point.nearest(work[:, i : i + 1])
            rounded = point.values(codes[:, i : i + 1])
            errors[:, i - start] = (work[:, i] - rounded[:, 0]) / inverse[i, i]
            work[:, i:stop] -= errors[:, i - start, None] * inverse[i, i:stop]
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    stored = np.empty_like(codes)
    stored[:, order] = codes
    return grid.pack(stored)


def _refit(grid: Grid, work: Floats, first: int) -> None:
    """Fit the grid of the group that begins with column ``first`` to the weights as they are.

    All errors so far have reached it, as groups do not go beyond blocks.
    """
    size = grid.scheme.group_size or work.shape[1]
    fitted = fit_grid(work[:, first : first + size], grid.scheme)
    grid.scales[:, first // size] = fitted.scales[:, 0]
    grid.zeros[:, first // size] = fitted.zeros[:, 0]


def _inverse_factor(hessian: Floats, damping: float) -> Floats:
    """The upper Cholesky factor of the damped Hessian's inverse  # [in, in]"""
    if not damping > 0:
        raise InvalidRequestError(f"GPTQ's damping is {damping}; it must be positive")
    damped = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
        if not np.isfinite(factor).all():
            raise np.linalg.LinAlgError("values that are not finite")
    except np.linalg.LinAlgError as error:
        raise InvalidRequestError(
            f"GPTQ cannot invert the statistics of a layer's inputs ({error}); "
            "calibrate on more text, or raise the damping"
        ) from error
    return np.ascontiguousarray(factor, np.float32)
