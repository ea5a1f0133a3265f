"""From canonical tensors back to the tensors that a checkpoint of the family stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fuserve.architectures import TensorSource
from fuserve.errors import UnsupportedModelError
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]


def stored_arrays(
    arrays: Mapping[str, Floats], targets: Mapping[str, TensorSource]
) -> dict[str, Floats]:
    """Stored name -> values, of canonical tensors that make up whole stored ones."""
    parts: dict[str, list[tuple[TensorSource, Floats]]] = {}
    for name, array in arrays.items():
        source = targets[name]
        values = array - np.float32(source.add) if source.add else array
        parts.setdefault(source.name, []).append((source, values))
    stored = {}
    for name, pieces in parts.items():
        rows = np.concatenate([values for _, values in pieces])
        whole = np.empty_like(rows)
        whole[_places([source for source, _ in pieces], [len(v) for _, v in pieces])] = rows
        stored[name] = np.ascontiguousarray(whole.T) if pieces[0][0].transpose else whole
    return stored


def stored_layers(
    layers: Mapping[str, QuantizedLinear], targets: Mapping[str, TensorSource]
) -> dict[str, QuantizedLinear]:
    """Module name -> layer, of canonical quantized layers that make up whole stored ones.

    Raises:
        UnsupportedModelError: layers that are stored together are quantized differently, or are
            stored transposed.
    """
    parts: dict[str, list[tuple[TensorSource, QuantizedLinear]]] = {}
    for name, layer in layers.items():
        parts.setdefault(targets[name].name, []).append((targets[name], layer))
    stored = {}
    for name, pieces in parts.items():
        module = name.removesuffix(".weight")
        if pieces[0][0].transpose:
            raise UnsupportedModelError(
                f"{module} is stored transposed, for which no quantized layout exists; convert the "
                "model to GGUF, or quantize it while loading (--quantization)."
            )
        places = _places([source for source, _ in pieces], [len(o.codes.codes) for _, o in pieces])
        stored[module] = _joined([layer for _, layer in pieces], places, module)
    return stored


def _joined(
    layers: list[QuantizedLinear], places: npt.NDArray[np.intp], module: str
) -> QuantizedLinear:
    first = layers[0]
    if any(layer.scheme != first.scheme for layer in layers):
        raise UnsupportedModelError(
            f"the layers that {module} holds together must have one scheme; give them all the same"
        )

    def rows(pieces: list[Array]) -> Array:
        joined = np.concatenate(pieces)
        whole = np.empty_like(joined)
        whole[places] = joined
        return whole

    codes = [layer.codes for layer in layers]
    minimums = [one.minimums for one in codes if one.minimums is not None]
    shifts = [layer.output_shift for layer in layers if layer.output_shift is not None]
    return replace(
        first,
        codes=Codes(
            rows([one.codes for one in codes]).view(np.uint8),
            rows([one.scales for one in codes]).view(np.float32),
            rows(list(minimums)).view(np.float32) if minimums else None,
        ),
        output_shift=rows(list(shifts)).view(np.float32) if shifts else None,
    )


def _places(sources: list[TensorSource], lengths: list[int]) -> npt.NDArray[np.intp]:
    """The stored row of each row of the pieces, in their order."""
    total = sum(lengths)
    places = []
    for source, length in zip(sources, lengths, strict=True):
        if source.rows is not None:
            places.append(np.arange(*source.rows))
        elif source.per_head is not None:
            places.append(source.per_head.rows(total))
        else:
            places.append(np.arange(length))
    return np.concatenate(places)
