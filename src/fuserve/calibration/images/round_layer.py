"""Rounding one layer of a denoiser, after smoothing what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fuserve.calibration.images.layers import ChosenLayer, in_channels
from fuserve.diffusion.program import Conv, Linear, Weights
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.awq import clipped_codes
from fuserve.quantization.rounding import round_to_nearest
from fuserve.quantization.smoothquant import (
    Smoothing,
    search_input_scale,
    search_smoothing,
)
from fuserve.quantization.statistics import InputStatistics

Floats = npt.NDArray[np.float32]

SEARCH_ROWS = 1024
"""Rows of the weights that searches look at."""

LOWEST_CODE = 1
"""Of int4, whose codes have 8 as their zero: from -7 on, as wide as the other side."""


def round_layer(
    layer: ChosenLayer, weights: Weights, inputs: InputStatistics, alpha: float | None
) -> Mapping[str, QuantizedLinear]:
    """The layer's matrices, by the names of their weights; a convolution's over its patches.

    A convolution is a sum of linear layers, one for each place of its kernel: smoothing and the
    input's scale are searched on those, over pixels.
    """
    op, scheme = layer.op, layer.scheme
    channels = in_channels(op)
    # [out, in, taps]
    matrices = {
        name: weights.float32(name).reshape(weights.shape(name)[0], channels, -1)
        for name in op.weight
    }
    rows = _some_rows(list(matrices.values()))
    vector = search_smoothing([rows], scheme, inputs, Smoothing(alpha), parts=_halves(op))
    if vector is not None:
        inputs, rows = inputs.transformed(None, vector), rows * vector
    input_scale = None
    if scheme.activations == "tensor":
        input_scale = search_input_scale([rows], scheme, inputs)
    rounded = {}
    for name, matrix in matrices.items():
        taps = matrix.shape[2]
        smoothed = matrix if vector is None else matrix * vector[:, None]
        flat = np.ascontiguousarray(smoothed).reshape(len(matrix), -1)
        rounded[name] = QuantizedLinear(
            scheme,
            _codes(flat, scheme, inputs),
            input_scale=input_scale,
            input_smoothing=None if vector is None else np.repeat(vector, taps),
        )
    for name in op.weight:
        weights.release(name)
    return rounded


def _codes(flat: Floats, scheme: QuantScheme, inputs: InputStatistics) -> Codes:
    if scheme.weight_bits == 8:
        return round_to_nearest(flat, scheme)
    sample = inputs.sample
    hessian = sample.T @ sample * np.float32(2 / len(sample))
    codes = clipped_codes(flat, scheme, replace(inputs, hessian=hessian))
    return replace(codes, codes=np.maximum(codes.codes, np.uint8(LOWEST_CODE)))


def _some_rows(matrices: Sequence[Floats]) -> Floats:
    """Rows of all taps of all matrices, drawn at random where there are many.  # [rows, in]"""
    taps = [matrix.transpose(0, 2, 1).reshape(-1, matrix.shape[1]) for matrix in matrices]
    rows = np.concatenate(taps)
    if len(rows) > SEARCH_ROWS:
        chosen = np.random.default_rng(0).choice(len(rows), SEARCH_ROWS, replace=False)
        rows = rows[np.sort(chosen)]
    return np.ascontiguousarray(rows, np.float32)


def _halves(op: Conv | Linear) -> npt.NDArray[np.intp] | None:
    """The source of each input channel, where there are two."""
    if isinstance(op, Linear) or len(op.sources) == 1:
        return None
    return np.repeat([0, 1], [source.channels for source in op.sources])
