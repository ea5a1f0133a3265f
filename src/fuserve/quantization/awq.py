"""AWQ (arXiv 2306.00978): scale up the weights of large inputs before rounding, and clip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from fuserve.kernels.linear import Codes
from fuserve.quantization.rounding import (
    fit_grid,
    group_of,
    round_on,
    rounded_values,
)
from fuserve.quantization.scheme import QuantScheme
from fuserve.quantization.statistics import InputStatistics

Floats = npt.NDArray[np.float32]

RATIOS = tuple(i / 10 for i in range(10))
"""Exponents of the inputs' magnitudes that are tried (the paper's alpha)."""

SHRINKS = tuple(1 - i / 20 for i in range(11))
"""Parts of a group's span that are tried as its range; weights beyond are clipped."""

LEAST_SCALE = 1e-4


def awq_smoothing(
    matrices: Sequence[Floats],
    scheme: QuantScheme,
    inputs: InputStatistics,
    share: npt.NDArray[np.intp] | None = None,
) -> Floats | None:
    """What to divide the inputs by, and multiply the columns of their matrices by.

    The vector is the inputs' mean magnitude to the power that makes the outputs' error least,
    ``sum((W - Q(W s) / s) X)^2`` over all matrices; None where no scaling is best. It is tried with
    and without dividing by the weights' own magnitude to one minus that power, as later releases of
    AWQ do. The paper takes the error of the whole attention for its first matrices; here each
    matrix counts by itself.

    Args:
        matrices: the layers that read the inputs.  # each [out, in]
        scheme: bits, groups, symmetry.
        inputs: statistics with a Hessian.
        share: features with equal numbers get equal factors.  # [in]
    """
    magnitudes = np.maximum(inputs.mean_magnitude, LEAST_SCALE)
    relative = np.maximum(_relative_magnitudes(matrices, scheme), LEAST_SCALE)
    if share is not None:
        magnitudes, relative = _shared_mean(magnitudes, share), _shared_mean(relative, share)
    best, best_error = None, np.inf
    for ratio, weighed in product(RATIOS, (False, True)):
        scale = magnitudes ** np.float32(ratio)
        if weighed:
            scale /= relative ** np.float32(1 - ratio)
        scale /= np.sqrt(scale.max() * scale.min())
        error = sum(
            output_error(rounded_values(matrix * scale, scheme) / scale - matrix, inputs)
            for matrix in matrices
        )
        if error < best_error:
            best, best_error = scale, error
    return None if best is None or (best == 1).all() else best


def _relative_magnitudes(matrices: Sequence[Floats], scheme: QuantScheme) -> Floats:
    """The mean magnitude of each feature's weights, as part of their groups' largest.  # [in]"""
    stacked = np.abs(np.concatenate(matrices))  # [all out, in]
    starts = np.arange(0, stacked.shape[1], scheme.group_size or stacked.shape[1])
    largest = np.maximum.reduceat(stacked, starts, axis=1)
    spread = largest[:, group_of(scheme, stacked.shape[1])]
    relative = np.divide(stacked, spread, out=np.zeros_like(stacked), where=spread > 0)
    mean: Floats = relative.mean(axis=0)
    return mean


def output_error(difference: Floats, inputs: InputStatistics) -> float:
    """The mean squared change of outputs by a change of weights, up to a factor."""
    assert inputs.hessian is not None
    return float(np.einsum("oi,oi->", difference @ inputs.hessian, difference))


def clipped_codes(weights: Floats, scheme: QuantScheme, inputs: InputStatistics) -> Codes:
    """Round-to-nearest on grids that clip where this lessens the outputs' error.

    Each group of each row is looked at by itself, as in AWQ's own search for clipping.

    Args:
        weights: ``[out, in]``.
        scheme: bits, groups, symmetry.
        inputs: statistics with a Hessian.
    """
    hessian = inputs.hessian
    assert hessian is not None
    groups = group_of(scheme, weights.shape[1])
    shape = (weights.shape[0], int(groups[-1]) + 1)
    best = np.full(shape, np.inf)
    chosen = np.ones(shape, np.float32)
    for shrink in SHRINKS:
        difference = rounded_values(weights, scheme, fit_grid(weights, scheme, shrink)) - weights
        for group in range(shape[1]):
            cols = groups == group
            part = difference[:, cols]
            error = np.einsum("oi,oi->o", part @ hessian[np.ix_(cols, cols)], part)
            better = error < best[:, group]
            best[better, group] = error[better]
            chosen[better, group] = shrink
    grid = fit_grid(weights, scheme, chosen)
    return grid.pack(round_on(grid, weights))


def _shared_mean(values: Floats, share: npt.NDArray[np.intp]) -> Floats:
    sums = np.bincount(share, weights=values) / np.bincount(share)
    return sums[share].astype(np.float32)
