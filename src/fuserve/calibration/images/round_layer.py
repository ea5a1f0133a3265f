"""Rounding one layer of a denoiser, after smoothing what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fuserve.calibration.images.layers import ChosenLayer, in_channels
from fuserve.diffusion.program import Weights
from fuserve.errors import CheckpointError
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.awq import clipped_codes
from fuserve.quantization.rounding import round_to_nearest
from fuserve.quantization.smoothquant import Smoothing, search_smoothing, widest_scale
from fuserve.quantization.statistics import InputStatistics

Floats = npt.NDArray[np.float32]

ALPHA = 0.7
"""SmoothQuant's migration strength for int8 weights. Fixed scales of the inputs, which have to span
all timesteps, lose more than the weights' scales, one for each output; and the search, which looks
at some pixels and misses those far from the rest, finds less (docs/quantization.md)."""

SEARCH_ROWS = 1024
"""Rows of int4 weights that the search for alpha looks at."""

LOWEST_CODE = 1
"""Of int4, whose codes have 8 as their zero: from -7 on, as wide as the other side."""


def round_layer(
    layer: ChosenLayer, weights: Weights, inputs: InputStatistics, alpha: float | None
) -> Mapping[str, QuantizedLinear]:
    """The layer's matrices, by the names of their weights; a convolution's over its patches.

    Each input channel is divided by a factor of its own, so also the halves of a concatenated
    input, whose sizes may differ much, have scales of their own.

    Raises:
        CheckpointError: the inputs are not finite.
    """
    op, scheme = layer.op, layer.scheme
    if not np.isfinite(inputs.largest).all():
        raise CheckpointError(
            f"The layer {op.name!r} reads values that are not finite: the float model fails too.",
            remedy="Paint with it (fuserve image) to see whether it works, and fetch it again.",
        )
    channels = in_channels(op)
    # [out, in, taps]
    matrices = {
        name: weights.float32(name).reshape(weights.shape(name)[0], channels, -1)
        for name in op.weight
    }
    strength = ALPHA if alpha is None and scheme.weight_bits == 8 else alpha
    # [out * taps, in]
    rows = np.concatenate([m.transpose(0, 2, 1).reshape(-1, channels) for m in matrices.values()])
    if strength is None:
        rows = _some(rows)
    vector = search_smoothing([rows], scheme, inputs, Smoothing(strength))
    if vector is not None:
        inputs = inputs.transformed(None, vector)
    # Nothing is clipped: a few pixels that are far from the rest decide what a picture shows, and
    # the range of one timestep is far from that of another.
    input_scale = widest_scale(inputs) if scheme.activations == "tensor" else None
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


def _some(rows: Floats) -> Floats:
    """As many as the search looks at, drawn at random."""
    if len(rows) <= SEARCH_ROWS:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), SEARCH_ROWS, replace=False)
    return rows[np.sort(chosen)]
