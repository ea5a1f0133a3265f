"""The layout of AWQ checkpoints (AutoAWQ's "gemm" version): packed along the output features.

Of a layer: ``qweight`` I32 ``[in, out / 8]`` and ``qzeros`` I32 ``[groups, out / 8]``, eight
nibbles a word in an order of their own, ``scales`` F16 ``[groups, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.quantized.bits import AWQ_ORDER, pack_words, unpack_words
from fuserve.checkpoints.quantized.stored_layer import (
    FLOATS,
    StoredLayer,
    floats,
    from_zero_points,
    grouping,
    refuse,
    require,
    scheme_or_refuse,
)
from fuserve.checkpoints.safetensors_folder import SafetensorsFolder
from fuserve.errors import UnsupportedModelError
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.rounding import unsigned_codes


def awq_layers(folder: SafetensorsFolder, config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """All layers of a folder in this layout, by module name.

    Raises:
        CheckpointError: parts are missing or do not fit together.
        UnsupportedModelError: another version of the layout, or groups fuserve does not compute.
    """
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit", 4))
    group_size = config.get("group_size", config.get("q_group_size", 128))
    if version != "gemm" or bits != 4 or not isinstance(group_size, int):
        raise UnsupportedModelError(
            f"{folder.path}: AWQ version {version!r} in {bits!r} bits with groups of "
            f"{group_size!r}; version 'gemm' in 4 bits is supported."
        )
    layers = {}
    for name in folder.tensor_names():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            layers[module] = _layer(folder, module, group_size, config.get("zero_point", True))
    return layers


def _layer(folder: SafetensorsFolder, module: str, group_size: int, has_zeros: bool) -> StoredLayer:
    part = (module + ".").__add__
    shape = folder.shape(part("qweight"))
    if len(shape) != 2:
        refuse(folder, part("qweight"), f"has shape {list(shape)}, expected two dimensions.")
    cols, rows = shape[0], shape[1] * 8
    groups = grouping(folder, module, group_size, cols)
    require(folder, part("qweight"), ("I32",), shape)
    require(folder, part("scales"), FLOATS, (groups.num_stored, rows))
    parts = [part("qweight"), part("scales")]
    if has_zeros:
        require(folder, part("qzeros"), ("I32",), (groups.num_stored, rows // 8))
        parts.append(part("qzeros"))
    scheme = scheme_or_refuse(
        folder, module, weight_bits=4, group_size=groups.group_size, symmetric=not has_zeros
    )

    def unpacked(name: str, rows: slice, cols: slice) -> npt.NDArray[np.uint8]:
        words = np.asarray(folder.tensor(part(name)).data)[cols, rows.start // 8 : rows.stop // 8]
        codes = unpack_words(words, 4, rows.stop - rows.start, AWQ_ORDER)
        return np.ascontiguousarray(codes.T)

    def read(rows: slice, cols: slice) -> QuantizedLinear:
        here, stored = groups.of(cols)
        scales = here.spread(floats(folder, part("scales"), stored, rows).T)
        zeros = here.spread(unpacked("qzeros", rows, stored)) if has_zeros else None
        codes = unpacked("qweight", rows, cols)
        return QuantizedLinear(scheme, from_zero_points(codes, scales, zeros, 4))

    return StoredLayer(tuple(parts), scheme, (rows, cols), read, groups.stored_size)


def write_awq(module: str, layer: QuantizedLinear) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of a 4-bit layer in this layout."""
    codes, zeros = unsigned_codes(layer)
    return {
        f"{module}.qweight": pack_words(np.ascontiguousarray(codes.T), 4, AWQ_ORDER),
        f"{module}.qzeros": pack_words(np.ascontiguousarray(zeros.T), 4, AWQ_ORDER),
        f"{module}.scales": np.ascontiguousarray(layer.codes.scales.T).astype(np.float16),
    }


def awq_config(scheme: QuantScheme, kept: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a folder whose layers all have ``scheme`` but those ``kept``."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }
