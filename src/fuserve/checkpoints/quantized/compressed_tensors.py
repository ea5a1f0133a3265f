"""The layout of compressed-tensors checkpoints, which llm-compressor and vLLM use.

Of a layer that is "pack-quantized": ``weight_packed`` I32 ``[out, in * bits / 32]``,
``weight_scale``, ``weight_shape`` and, if asymmetric, ``weight_zero_point`` packed along its rows.
"int-quantized": ``weight`` I8. Codes are signed: ``scale * (code - zero)``. Static activations have
``input_scale`` ``[1]``. ``weight_g_idx`` is the group of each input feature where they are not runs
of neighbours.

fuserve adds ``input_smoothing``, ``input_shift`` and ``output_shift`` where nothing before the
layer could take them up; such a folder has the quant_method "fuserve", so that no other reader
takes it for what it is not.

A convolution, ``weight`` I8 ``[out, in, size, size]``, is read as the linear layer over patches
that it is, ``[out, in * size * size]``; its ``input_smoothing`` is stored once for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.quantized.bits import pack_words, unpack_words, words
from fuserve.checkpoints.quantized.compressed_config import (
    CompressedGroup,
    group_of_module,
    read_groups,
    scheme_entry,
    storage_format,
)
from fuserve.checkpoints.quantized.stored_layer import (
    FLOATS,
    REGRIDDED,
    Grouping,
    StoredLayer,
    floats,
    from_zero_points,
    grouping,
    irregular_groups,
    refuse,
    require,
    scheme_or_refuse,
)
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.quantization import QuantizedLinear, QuantScheme
from fuserve.quantization.rounding import round_to_nearest, unsigned_codes

VECTORS = ("input_smoothing", "input_shift", "output_shift")


def compressed_layers(folder: StoredTensors, config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """All quantized layers of a folder in this layout, by module name.

    Raises:
        CheckpointError: parts are missing or do not fit together.
        UnsupportedModelError: a scheme that fuserve does not compute.
    """
    groups = read_groups(folder.path, config)
    layers = {}
    for name in folder.tensor_names():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and f"{module}.weight_scale" in folder):
            layers[module] = _Reader(folder, module, group_of_module(folder.path, groups, module))
    return {module: reader.layer() for module, reader in layers.items()}


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: StoredTensors
    module: str
    group: CompressedGroup

    def part(self, name: str) -> str:
        return f"{self.module}.{name}"

    def has(self, name: str) -> bool:
        return self.part(name) in self.folder

    def array(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(self.folder.tensor(self.part(name)).data)

    def layer(self) -> StoredLayer:
        """Check the parts against each other, as far as headers tell."""
        rows, cols = self._shape()
        group = self.group
        groups = grouping(self.folder, self.module, group.group_size, cols)
        parts = ["weight_packed", "weight_shape"] if self.has("weight_packed") else ["weight"]
        scales: tuple[int, ...] = (rows, groups.num_stored)
        if group.strategy == "tensor":
            scales = self._one_value("weight_scale")
        require(self.folder, self.part("weight_scale"), FLOATS, scales)
        parts.append("weight_scale")
        if not group.symmetric:
            parts.append("weight_zero_point")
            self._check_zeros(rows, groups.num_stored)
        if group.activations == "tensor":
            parts += self._input_parts()
        vectors = [name for name in VECTORS if self.has(name)]
        parts += vectors
        if group.activations == "tensor" and group.shifted_inputs:
            vectors += ["input_shift", "output_shift"]
        scheme = scheme_or_refuse(
            self.folder,
            self.module,
            weight_bits=group.bits,
            group_size=groups.group_size,
            symmetric=group.symmetric,
            activations=group.activations,
        )
        order = self._order(cols, groups.num_stored)
        if order is not None:
            parts.append("weight_g_idx")
            scheme = REGRIDDED
        named = tuple(map(self.part, parts))
        shape = (rows, cols)
        return StoredLayer(
            named,
            scheme,
            shape,
            lambda rows, cols: self._read(scheme, rows, cols, groups, order),
            cols if group.shifted_inputs else groups.stored_size,
            frozenset(vectors),
        )

    def _shape(self) -> tuple[int, int]:
        name = self.part("weight_packed" if self.has("weight_packed") else "weight")
        stored = self.folder.shape(name)
        if not self.has("weight_packed") and len(stored) == 4:
            require(self.folder, name, ("I8",), stored)
            return stored[0], math.prod(stored[1:])
        if len(stored) != 2:
            refuse(self.folder, name, f"has shape {list(stored)}, expected two dimensions.")
        if not self.has("weight_packed"):
            require(self.folder, name, ("I8",), stored)
            return stored[0], stored[1]
        require(self.folder, name, ("I32",), stored)
        require(self.folder, self.part("weight_shape"), ("I64", "I32"), (2,))
        rows, cols = (int(size) for size in self.array("weight_shape"))
        if (rows, -(-cols * self.group.bits // 32)) != stored:
            refuse(
                self.folder,
                name,
                f"has shape {list(stored)}, but weight_shape is {[rows, cols]} in "
                f"{self.group.bits} bits.",
            )
        return rows, cols

    def _taps(self) -> int:
        """Weights of a convolution for each pair of channels; 1 of a linear layer."""
        if self.has("weight_packed"):
            return 1
        return math.prod(self.folder.shape(self.part("weight"))[2:])

    def _check_zeros(self, rows: int, num_groups: int) -> None:
        name = self.part("weight_zero_point")
        if self.has("weight_packed") and self.has("weight_zero_point"):
            packed_rows = -(-rows * self.group.bits // 32)
            if self.folder.dtype(name) == "I32":
                require(self.folder, name, ("I32",), (packed_rows, num_groups))
                return
        require(self.folder, name, ("I8",), (rows, num_groups))

    def _input_parts(self) -> list[str]:
        parts = (
            ["input_scale", "input_zero_point"] if self.group.shifted_inputs else ["input_scale"]
        )
        for name in parts:
            dtypes = FLOATS if name == "input_scale" else ("I8",)
            require(self.folder, self.part(name), dtypes, self._one_value(name))
        return parts

    def _one_value(self, name: str) -> tuple[int, ...]:
        """The shape that a single value should have; writers differ."""
        is_scalar = self.has(name) and self.folder.shape(self.part(name)) == ()
        return () if is_scalar else (1,)

    def _order(self, cols: int, num_groups: int) -> npt.NDArray[np.intp] | None:
        if not self.has("weight_g_idx"):
            return None
        name = self.part("weight_g_idx")
        require(self.folder, name, ("I32", "I64"), (cols,))
        return irregular_groups(self.folder, name, num_groups, self.group.group_size)

    def _read(
        self,
        scheme: QuantScheme,
        rows: slice,
        cols: slice,
        groups: Grouping,
        order: npt.NDArray[np.intp] | None,
    ) -> QuantizedLinear:
        bits = self.group.bits
        num_rows, num_cols = rows.stop - rows.start, cols.stop - cols.start
        here, stored = (
            (groups, slice(0, groups.num_stored)) if order is not None else groups.of(cols)
        )
        if self.has("weight_packed"):
            codes = unpack_words(
                self.array("weight_packed")[rows, words(cols, bits)], bits, num_cols
            )
        else:
            stored_codes = self.array("weight").reshape(self._shape())[rows, cols]
            codes = stored_codes.view(np.uint8) ^ np.uint8(128)
            if bits == 4:
                codes = codes - np.uint8(120)  # from 128 + q to 8 + q
        place = () if self.group.strategy == "tensor" else (rows, stored)
        scales = np.broadcast_to(
            floats(self.folder, self.part("weight_scale"), *place).reshape(-1, here.num_stored),
            (num_rows, here.num_stored),
        )
        zeros = None if self.group.symmetric else self._zeros(rows, stored)
        if order is not None:
            places = order[cols]
            middle = np.uint8(2 ** (bits - 1)) if zeros is None else zeros[:, places]
            values = scales[:, places] * (codes.astype(np.float32) - middle)
            layer = QuantizedLinear(scheme, round_to_nearest(values, scheme))
            return self._with_inputs(layer, rows, cols)
        spread = None if zeros is None else here.spread(zeros)
        packed = from_zero_points(codes, here.spread(scales), spread, bits)
        return self._with_inputs(QuantizedLinear(scheme, packed), rows, cols)

    def _zeros(self, rows: slice, groups: slice) -> npt.NDArray[np.uint8]:
        stored, bits = self.array("weight_zero_point"), self.group.bits
        if stored.dtype == np.int32:
            return unpack_words(stored[words(rows, bits), groups].T, bits, rows.stop - rows.start).T
        middle = 2 ** (bits - 1)
        signed = stored[rows, groups].astype(np.int16)
        unsigned: npt.NDArray[np.uint8] = (signed + middle).astype(np.uint8)
        return unsigned

    def _with_inputs(self, layer: QuantizedLinear, rows: slice, cols: slice) -> QuantizedLinear:
        """The layer with its input scale and vectors, read and checked."""
        all_rows, all_cols = self._shape()
        vectors: dict[str, Any] = {}
        for name in VECTORS:
            if self.has(name):
                if name == "output_shift":
                    require(self.folder, self.part(name), FLOATS, (all_rows,))
                    vectors[name] = floats(self.folder, self.part(name), rows)
                    continue
                taps = self._taps()
                require(self.folder, self.part(name), FLOATS, (all_cols // taps,))
                first, last = cols.start // taps, -(-cols.stop // taps)
                vector = floats(self.folder, self.part(name), slice(first, last))
                if name == "input_smoothing" and not (vector > 0).all():
                    refuse(self.folder, self.part(name), "holds values that are not above 0.")
                skipped = cols.start - first * taps
                vectors[name] = np.repeat(vector, taps)[skipped:][: cols.stop - cols.start]
        layer = replace(layer, **vectors)
        if self.group.activations != "tensor":
            return layer
        scale = float(floats(self.folder, self.part("input_scale")).reshape(-1)[0])
        if scale <= 0:
            refuse(self.folder, self.part("input_scale"), f"is {scale}, expected more than 0.")
        layer = replace(layer, input_scale=scale)
        if not self.group.shifted_inputs:
            return layer
        # scale * (q - zero) is a symmetric grid around a constant shift. Its share of the output is
        # that of all input features, which is why such a layer is not read in part.
        shift = np.float32(-scale * int(self.array("input_zero_point").reshape(-1)[0]))
        share = layer.values().sum(axis=1, dtype=np.float32) * shift
        wide_shift = np.full(layer.shape[1], shift, np.float32)
        return replace(layer, input_shift=wide_shift, output_shift=share)


def write_compressed(
    module: str, layer: QuantizedLinear, shape: tuple[int, ...] | None = None
) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of a layer in this layout.

    Args:
        module: its name.
        layer: of a convolution the linear layer over its patches, of int8.
        shape: of a convolution's weight; None of a linear layer.
    """
    bits = layer.scheme.weight_bits
    codes, zeros = unsigned_codes(layer)
    parts: dict[str, npt.NDArray[np.generic]] = {"weight_scale": layer.codes.scales}
    if storage_format(layer.scheme) == "pack-quantized":
        parts["weight_packed"] = pack_words(codes, bits)
        parts["weight_shape"] = np.array(layer.shape, np.int64)
        if not layer.scheme.symmetric:
            packed = pack_words(np.ascontiguousarray(zeros.T), bits).T
            parts["weight_zero_point"] = np.ascontiguousarray(packed)
    else:
        parts["weight"] = layer.codes.codes.view(np.int8).reshape(shape or layer.shape)
    if layer.input_scale is not None:
        parts["input_scale"] = np.array([layer.input_scale], np.float32)
    for name in VECTORS:
        if (vector := getattr(layer, name)) is not None:
            taps = layer.shape[1] // shape[1] if shape and name != "output_shift" else 1
            parts[name] = np.ascontiguousarray(vector[::taps])
    return {f"{module}.{name}": array for name, array in parts.items()}


def compressed_config(
    modules: Mapping[str, QuantScheme],
    kept: Sequence[str],
    *,
    has_vectors: bool,
    only_linears: bool = True,
) -> dict[str, Any]:
    """``quantization_config`` of a folder.

    Args:
        modules: the scheme of each quantized layer, by module name.
        kept: linear layers that are not quantized.
        has_vectors: a layer has vectors that only fuserve knows.
        only_linears: False: there are convolutions among them, so each layer is named.
    """
    by_scheme: dict[QuantScheme, list[str]] = {}
    for module, scheme in modules.items():
        by_scheme.setdefault(scheme, []).append(module)
    commonest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    groups: dict[str, Any] = {}
    # Names go before the class Linear, so the commonest scheme, which takes it, comes last.
    for scheme in sorted(by_scheme, key=lambda one: one == commonest):
        is_rest = only_linears and scheme == commonest
        targets = ["Linear"] if is_rest else by_scheme[scheme]
        groups[f"group_{len(groups)}"] = scheme_entry(scheme, targets)
    formats = {storage_format(scheme) for scheme in by_scheme}
    return {
        "quant_method": "fuserve" if has_vectors else "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
