"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel): packed along the input features.

Of a layer: ``qweight`` I32 ``[in * bits / 32, out]``, ``qzeros`` I32 ``[groups, out * bits / 32]``,
``scales`` F16 ``[groups, out]``, ``g_idx`` I32 ``[in]``, the group of each input feature. The
first version of the format stores zero points minus one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.quantized.bits import pack_words, unpack_words, words
from fuserve.checkpoints.quantized.stored_layer import (
    FLOATS,
    REGRIDDED,
    StoredLayer,
    floats,
    from_zero_points,
    grouping,
    irregular_groups,
    refuse,
    require,
    scheme_or_refuse,
)
from fuserve.checkpoints.safetensors_folder import SafetensorsFolder
from fuserve.errors import UnsupportedModelError
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.rounding import round_to_nearest, unsigned_codes


def gptq_layers(folder: SafetensorsFolder, config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """All layers of a folder in this layout, by module name.

    Raises:
        CheckpointError: parts are missing or do not fit together.
        UnsupportedModelError: bits or groups that fuserve does not compute.
    """
    bits = config.get("bits")
    if bits not in (4, 8):
        raise UnsupportedModelError(f"{folder.path}: GPTQ in {bits!r} bits; 4 and 8 are supported.")
    group_size = config.get("group_size", 128)
    if not isinstance(group_size, int):
        raise UnsupportedModelError(f"{folder.path}: GPTQ group_size {group_size!r} is no integer.")
    is_first = config.get("checkpoint_format") != "gptq_v2"
    symmetric = config.get("sym") is True
    layers = {}
    for name in folder.tensor_names():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            layers[module] = _layer(folder, module, bits, group_size, symmetric, is_first)
    return layers


def _layer(
    folder: SafetensorsFolder,
    module: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    is_first: bool,
) -> StoredLayer:
    part = (module + ".").__add__
    shape = folder.shape(part("qweight"))
    if len(shape) != 2:
        refuse(folder, part("qweight"), f"has shape {list(shape)}, expected two dimensions.")
    cols, rows = shape[0] * 32 // bits, shape[1]
    groups = grouping(folder, module, group_size, cols)
    stored = groups.num_stored
    require(folder, part("qweight"), ("I32",), shape)
    require(folder, part("qzeros"), ("I32",), (stored, -(-rows * bits // 32)))
    require(folder, part("scales"), FLOATS, (stored, rows))
    parts = [part("qweight"), part("qzeros"), part("scales")]
    order = None
    if part("g_idx") in folder:
        require(folder, part("g_idx"), ("I32",), (cols,))
        parts.append(part("g_idx"))
        order = irregular_groups(folder, part("g_idx"), stored, group_size)
    own = scheme_or_refuse(
        folder, module, weight_bits=bits, group_size=groups.group_size, symmetric=symmetric
    )

    def stored_array(name: str) -> npt.NDArray[np.int32]:
        return np.asarray(folder.tensor(part(name)).data, np.int32)

    def read(rows: slice, cols: slice) -> QuantizedLinear:
        here, stored = (groups, slice(None)) if order is not None else groups.of(cols)
        num_rows, num_cols = rows.stop - rows.start, cols.stop - cols.start
        codes = unpack_words(stored_array("qweight")[words(cols, bits), rows].T, bits, num_cols)
        zeros = unpack_words(stored_array("qzeros")[stored, words(rows, bits)], bits, num_rows).T
        if is_first:
            zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
        scales = floats(folder, part("scales"), stored, rows).T  # [out, stored groups]
        if order is not None:
            places = order[cols]
            values = scales[:, places] * (codes.astype(np.float32) - zeros[:, places])
            return QuantizedLinear(REGRIDDED, round_to_nearest(values, REGRIDDED))
        if symmetric and not (zeros == 2 ** (bits - 1)).all():
            refuse(folder, part("qzeros"), "has zero points, although the config says sym.")
        zeros_here = None if symmetric else here.spread(zeros)
        return QuantizedLinear(own, from_zero_points(codes, here.spread(scales), zeros_here, bits))

    scheme = own if order is None else REGRIDDED
    return StoredLayer(tuple(parts), scheme, (rows, cols), read, groups.stored_size)


def write_gptq(module: str, layer: QuantizedLinear) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of a layer in the first version of this layout, which every reader knows."""
    bits, cols = layer.scheme.weight_bits, layer.shape[1]
    codes, zeros = unsigned_codes(layer)
    stored_zeros = (zeros - np.uint8(1)) & np.uint8(2**bits - 1)
    per_group = layer.scheme.group_size or cols
    return {
        f"{module}.qweight": np.ascontiguousarray(pack_words(codes, bits).T),
        f"{module}.qzeros": pack_words(np.ascontiguousarray(stored_zeros.T), bits),
        f"{module}.scales": np.ascontiguousarray(layer.codes.scales.T).astype(np.float16),
        f"{module}.g_idx": (np.arange(cols) // per_group).astype(np.int32),
    }


def gptq_config(scheme: QuantScheme, damping: float) -> dict[str, Any]:
    """``quantization_config`` of a folder whose layers all have ``scheme``."""
    return {
        "quant_method": "gptq",
        "bits": scheme.weight_bits,
        "group_size": scheme.group_size or -1,
        "desc_act": False,
        "static_groups": True,
        "sym": scheme.symmetric,
        "damp_percent": damping,
        "true_sequential": False,
        "checkpoint_format": "gptq",
    }
