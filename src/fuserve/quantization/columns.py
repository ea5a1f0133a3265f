"""Some input features of quantized weights: what a tensor-parallel rank reads of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fuserve.kernels.linear import Codes, Storage, WeightFormat
from fuserve.quantization.quantized import QuantizedLinear
from fuserve.quantization.rounding import round_to_nearest
from fuserve.quantization.scheme import GROUP_SIZES, QuantScheme

REGRID = QuantScheme(8, GROUP_SIZES[0])
"""What weights are rounded to again where no group of theirs begins with the first feature."""

Floats = npt.NDArray[np.float32]


def scheme_from(scheme: QuantScheme, first: int) -> QuantScheme:
    """The scheme of the features from ``first`` on.

    Groups that the cut goes through are told in smaller ones with equal scales, which loses
    nothing; where 32 features are too many still, the weights are rounded to int8.
    """
    if scheme.group_size == 0 or first % scheme.group_size == 0:
        return scheme
    sizes = [size for size in GROUP_SIZES if size < scheme.group_size and first % size == 0]
    return replace(scheme, group_size=max(sizes)) if sizes else REGRID


def grid_from(storage: Storage, first: int) -> Storage:
    """The same for a block type's grid, whose blocks are the smallest groups."""
    aligned = storage.group_size == 0 or first % storage.group_size == 0
    return storage if aligned else Storage(WeightFormat.Q8, GROUP_SIZES[0])


def take_columns(layer: QuantizedLinear, first: int, stop: int) -> QuantizedLinear:
    """The layer of the input features ``first:stop``; its scheme is ``scheme_from``'s.

    ``output_shift`` stays that of all features.
    """
    scheme = scheme_from(layer.scheme, first)
    smoothing, shift = layer.input_smoothing, layer.input_shift
    return replace(
        layer,
        scheme=scheme,
        codes=_codes(layer, scheme, first, stop),
        input_smoothing=None if smoothing is None else smoothing[first:stop],
        input_shift=None if shift is None else shift[first:stop],
    )


def _codes(layer: QuantizedLinear, scheme: QuantScheme, first: int, stop: int) -> Codes:
    stored, own = layer.codes, layer.scheme
    if scheme.group_size and first % scheme.group_size:
        return round_to_nearest(layer.values()[:, first:stop], scheme)

    def groups(values: Floats) -> Floats:
        if not own.group_size:
            return values
        values = np.repeat(values, own.group_size // scheme.group_size, axis=1)
        return values[:, first // scheme.group_size : -(-stop // scheme.group_size)]

    codes = np.ascontiguousarray(stored.codes[:, first:stop])
    minimums = None if stored.minimums is None else np.ascontiguousarray(groups(stored.minimums))
    return Codes(codes, np.ascontiguousarray(groups(stored.scales)), minimums)
