"""bitsandbytes' int8 layout, which LLM.int8() checkpoints have.

Of a layer: ``weight`` I8 ``[out, in]``, ``SCB`` F32 ``[out]``, the largest magnitude of each row,
which code 127 stands for; ``weight_format`` 0 says that rows lie in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.quantized.stored_layer import (
    StoredLayer,
    floats,
    refuse,
    require,
    scheme_or_refuse,
)
from fuserve.checkpoints.safetensors_folder import SafetensorsFolder
from fuserve.errors import UnsupportedModelError
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.scheme import OUTLIER_THRESHOLD


def bitsandbytes_layers(
    folder: SafetensorsFolder, config: Mapping[str, Any]
) -> dict[str, StoredLayer]:
    """All int8 layers of a folder in this layout, by module name.

    Raises:
        CheckpointError: parts are missing or do not fit together.
        UnsupportedModelError: the 4-bit layouts, or rows that are not in order.
    """
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        raise UnsupportedModelError(
            f"{folder.path}: bitsandbytes' 4-bit layouts are not supported, its int8 is. "
            "Quantize the original model with fuserve quantize."
        )
    threshold = config.get("llm_int8_threshold", OUTLIER_THRESHOLD)
    if not isinstance(threshold, int | float) or threshold < 0:
        raise UnsupportedModelError(
            f"{folder.path}: llm_int8_threshold is {threshold!r}, not a number from 0 on."
        )
    layers = {}
    for name in folder.tensor_names():
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            layers[module] = _layer(folder, module, float(threshold) or None)
    return layers


def _layer(folder: SafetensorsFolder, module: str, threshold: float | None) -> StoredLayer:
    part = (module + ".").__add__
    require(folder, part("weight"), ("I8",), _two_dimensions(folder, part("weight")))
    rows, cols = folder.shape(part("weight"))
    if folder.shape(part("SCB")) not in ((rows,), (rows, 1)):
        require(folder, part("SCB"), ("F32",), (rows,))
    parts = [part("weight"), part("SCB")]
    if part("weight_format") in folder:
        parts.append(part("weight_format"))
        if int(np.asarray(folder.tensor(part("weight_format")).data).reshape(-1)[0]) != 0:
            raise UnsupportedModelError(
                f"{folder.path}: layer {module!r} lies in a GPU's order of rows "
                "(weight_format is not 0). Save it again with a current bitsandbytes."
            )
    scheme = scheme_or_refuse(
        folder, module, weight_bits=8, activations="token", outlier_threshold=threshold
    )

    def read(rows: slice, cols: slice) -> QuantizedLinear:
        scales = floats(folder, part("SCB"), rows).reshape(-1, 1) / np.float32(127)
        codes = np.asarray(folder.tensor(part("weight")).data)[rows, cols].view(np.uint8)
        return QuantizedLinear(scheme, Codes(np.ascontiguousarray(codes), scales))

    return StoredLayer(tuple(parts), scheme, (rows, cols), read)


def _two_dimensions(folder: SafetensorsFolder, name: str) -> tuple[int, ...]:
    if name not in folder:
        refuse(folder, name, "is missing, although its scales (SCB) are there.")
    shape = folder.shape(name)
    if len(shape) != 2:
        refuse(folder, name, f"has shape {list(shape)}, expected two dimensions.")
    return shape


def write_bitsandbytes(module: str, layer: QuantizedLinear) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of an int8 layer in this layout."""
    return {
        f"{module}.weight": layer.codes.codes.view(np.int8),
        f"{module}.SCB": layer.codes.scales[:, 0] * np.float32(127),
        f"{module}.weight_format": np.zeros((), np.uint8),
    }


def bitsandbytes_config(scheme: QuantScheme, kept: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a folder whose layers all have ``scheme`` but those ``kept``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": scheme.outlier_threshold or 0.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept or None,
    }
