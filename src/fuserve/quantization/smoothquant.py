"""SmoothQuant (arXiv 2211.10438), with channel shift and a search piece by piece.

The inputs' outliers are moved into the weights: ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``.
The search tries alphas, for pieces of the features in the order of their magnitude, and factors of
the pieces, and keeps what makes the error of the rounded layer's outputs least (PaddleSlim's
piecewise search). The shift makes each feature's range even around zero before (Outlier
Suppression+, arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.errors import InvalidRequestError
from fuserve.quantization.rounding import rounded_values
from fuserve.quantization.scheme import QuantScheme
from fuserve.quantization.statistics import InputStatistics

Floats = npt.NDArray[np.float32]

ALPHA = 0.5
ALPHAS = tuple(i / 20 for i in range(4, 19))
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
CLIPS = tuple(1 - i / 20 for i in range(11))
LEAST = 1e-5
BLOCK = 32
"""Features of an input that share a scale where activations are quantized in blocks."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How strongly to smooth.

    Attributes:
        alpha: migration strength from 0, all difficulty left in the inputs, to 1, all moved to the
            weights; None searches it for each place.
        pieces: pieces of features that are searched apart; 1 is a single alpha per place.
        shift: move each feature's range to be even around zero.
    """

    alpha: float | None = None
    pieces: int = 1
    shift: bool = False


def check_alpha(alpha: float | None) -> None:
    """Raise InvalidRequestError for a migration strength that is none; None is one to search."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidRequestError(f"alpha is {alpha}; it must lie between 0 and 1")


def channel_shift(inputs: InputStatistics, share: npt.NDArray[np.intp] | None = None) -> Floats:
    """The middle of each feature's range.  # [in]"""
    low, high = inputs.low, inputs.high
    if share is not None:
        low, high = -shared_max(-low, share), shared_max(high, share)
    middle: Floats = (low + high) * np.float32(0.5)
    return middle


def smoothing_of(alpha: Floats | float, inputs: Floats, weights: Floats) -> Floats:
    """The paper's vector, from the largest magnitudes of each input and of its weights.  # [in]"""
    strength = np.asarray(alpha, np.float32)
    largest, widest = np.maximum(inputs, LEAST), np.maximum(weights, LEAST)
    smoothing = largest**strength / widest ** (1 - strength)
    return np.maximum(smoothing, np.float32(LEAST), dtype=np.float32)


def search_smoothing(
    matrices: Sequence[Floats],
    scheme: QuantScheme,
    inputs: InputStatistics,
    wanted: Smoothing,
    share: npt.NDArray[np.intp] | None = None,
) -> Floats | None:
    """What to divide the inputs by, and multiply the columns of their matrices by.  # [in]

    None where leaving them alone is best, which only a search can find.

    Args:
        matrices: the layers that read the inputs.  # each [out, in]
        scheme: its activations rounded per token, block or tensor.
        inputs: statistics, after any shift.
        wanted: a fixed alpha, or how to search.
        share: features with equal numbers get equal factors.  # [in]
    """
    largest = inputs.largest
    widest = np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0)
    if share is not None:
        largest, widest = shared_max(largest, share), shared_max(widest, share)
    if wanted.alpha is not None:
        return smoothing_of(wanted.alpha, largest, widest)

    def error_of(smoothing: Floats) -> float:
        return rounding_error(matrices, scheme, inputs, smoothing)

    none = np.ones_like(largest)
    best, best_error = none, error_of(none)
    alphas = np.full_like(largest, ALPHA)
    factors = np.ones_like(largest)
    for piece in _pieces(largest, wanted.pieces):
        for alpha in ALPHAS:
            tried = np.where(piece, np.float32(alpha), alphas)
            smoothing = factors * smoothing_of(tried, largest, widest)
            if (error := error_of(smoothing)) < best_error:
                best, best_error, alphas = smoothing, error, tried
        for factor in FACTORS if wanted.pieces > 1 else ():
            tried = np.where(piece, np.float32(factor), factors)
            smoothing = tried * smoothing_of(alphas, largest, widest)
            if (error := error_of(smoothing)) < best_error:
                best, best_error, factors = smoothing, error, tried
    return None if best is none else best


def _pieces(largest: Floats, count: int) -> list[npt.NDArray[np.bool_]]:
    """Masks of pieces, the whole first, then from the largest features down.  # each [in]"""
    whole = np.ones(largest.shape, np.bool_)
    if count == 1:
        return [whole]
    rank = np.argsort(np.argsort(-largest, kind="stable"))
    piece = rank * count // largest.size
    return [whole, *(piece == i for i in range(count))]


def rounding_error(
    matrices: Sequence[Floats],
    scheme: QuantScheme,
    inputs: InputStatistics,
    smoothing: Floats,
) -> float:
    """The squared error of the outputs over the sample when inputs and weights are rounded."""
    sample = inputs.sample / smoothing
    largest: npt.NDArray[np.floating[Any]]
    if scheme.activations == "tensor":
        largest = np.max(inputs.largest / smoothing, keepdims=True)
    elif scheme.activations == "block":
        starts = np.arange(0, sample.shape[1], BLOCK)
        blocks = np.maximum.reduceat(np.abs(sample), starts, axis=1)
        largest = np.repeat(blocks, BLOCK, axis=1)[:, : sample.shape[1]]
    else:
        largest = np.abs(sample).max(axis=1, keepdims=True)
    rounded = round_inputs(sample, (largest / 127).astype(np.float32))
    total = 0.0
    for matrix in matrices:
        weights = rounded_values(matrix * smoothing, scheme)
        difference = rounded @ weights.T - inputs.sample @ matrix.T
        total += float(np.square(difference).sum(dtype=np.float64))
    return total


def search_input_scale(
    matrices: Sequence[Floats], scheme: QuantScheme, inputs: InputStatistics
) -> float:
    """The step of static activations whose clipping and rounding change the outputs least.

    Args:
        matrices: the layers that read the inputs, smoothed.  # each [out, in]
        scheme: int8 with activations per tensor.
        inputs: statistics after shift and smoothing.
    """
    widest = widest_scale(inputs)
    weights = [rounded_values(matrix, scheme) for matrix in matrices]
    exact = [inputs.sample @ matrix.T for matrix in matrices]

    def error_of(scale: float) -> float:
        rounded = round_inputs(inputs.sample, np.float32(scale))
        return sum(
            float(np.square(rounded @ w.T - y).sum(dtype=np.float64))
            for w, y in zip(weights, exact, strict=True)
        )

    return min((widest * clip for clip in CLIPS), key=error_of)


def widest_scale(inputs: InputStatistics) -> float:
    """The step of static activations that clips nothing that calibration has seen."""
    return max(float(inputs.largest.max()) / 127, float(np.finfo(np.float32).tiny))


def round_inputs(rows: Floats, scale: Floats | np.float32) -> Floats:
    """Activations as int8 would carry them.  # [rows, in]"""
    safe = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(rows / safe), -127, 127) * safe


def shared_max(values: Floats, share: npt.NDArray[np.intp]) -> Floats:
    """The largest value among features of equal number, for each of them.  # [in]"""
    largest = np.full(int(share.max()) + 1, -np.inf, np.float32)
    np.maximum.at(largest, share, values)
    return largest[share]
