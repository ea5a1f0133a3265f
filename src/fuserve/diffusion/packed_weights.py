"""Weights in the layouts that the kernels read, packed once and shared by programs of all sizes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve._native import (
    ConvShape,
    GroupNorm,
    LinearShape,
    Norm,
    PackedConv,
    PackedLinear,
    ThreadPool,
)
from fuserve.diffusion import program as ops
from fuserve.diffusion.conv_method import usual_method
from fuserve.diffusion.packed_integers import (
    conv_quantization,
    linear_codes,
    linear_input,
    linear_storage,
    stacked,
)
from fuserve.kernels.conv import (
    ConvMethod,
    ConvQuantization,
    ConvWeights,
    conv_shape,
    pack_conv,
    pack_conv_codes,
    packed_conv,
)
from fuserve.kernels.linear import (
    LinearInput,
    Storage,
    WeightFormat,
    pack_codes,
    pack_floats,
    packed_linear,
)

FLOAT32 = Storage(WeightFormat.F32)

TILE_ROWS = 16
"""Rows of a packed tile (``csrc/linear/format.h``)."""

Packed = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PackingOptions:
    """How weights are kept.

    Attributes:
        linear: the format of linear layers.
        half_conv: keep convolutions as float16.
        exact_conv: compute every convolution directly, or no less exactly (an upsampling one).
    """

    linear: Storage = FLOAT32
    half_conv: bool = False
    exact_conv: bool = False

    def storage(self, op: ops.Linear) -> Storage:
        """The format of a linear's weights."""
        return FLOAT32 if op.precise else self.linear

    def conv_shape(self, op: ops.Conv, *, is_integer: bool = False) -> ConvShape:
        """A convolution as it is packed; ``is_integer`` where its weights are."""
        first, *rest = (source.channels for source in op.sources)
        method = usual_method(op, is_integer=is_integer)
        if self.exact_conv and not op.upsample:
            method = ConvMethod.DIRECT
        floats = ConvWeights.FLOAT16 if self.half_conv else ConvWeights.FLOAT32
        return conv_shape(
            (first, rest[0] if rest else 0),
            op.out.channels,
            op.size,
            stride=op.stride,
            padding=op.padding,
            upsample=op.upsample,
            method=method,
            weights=ConvWeights.INT8 if is_integer else floats,
        )


@dataclass(frozen=True, slots=True)
class _PackedConv:
    """What convolutions of one weight share; how an image is padded does not change it."""

    weights: Packed
    bias: ops.Array | None
    quantization: ConvQuantization | None


class PackedWeights:
    """One checkpoint's tensors as operations want them, packed when they are first asked for.

    Unpacked tensors are read one at a time and let go again, so that memory stays near the packed
    size. For one thread at a time.

    Args:
        weights: where the tensors come from.
        pool: the threads that pack.
        options: how they are kept.
    """

    def __init__(
        self, weights: ops.Weights, pool: ThreadPool, options: PackingOptions = PackingOptions()
    ) -> None:
        self._weights, self._pool, self._options = weights, pool, options
        self._vectors: dict[str, ops.Array] = {}
        self._linears: dict[tuple[object, ...], PackedLinear] = {}
        self._convs: dict[tuple[object, ...], _PackedConv] = {}
        self.packed_bytes = 0
        """What all packed weights take so far."""

    def group_norm(self, norm: ops.GroupNorm) -> GroupNorm:
        """A group norm with its vectors."""
        weight, bias = self._vector(norm.weight), self._vector(norm.bias)
        return GroupNorm(norm.groups, norm.eps, norm.silu, weight, bias)

    def layer_norm(self, norm: ops.LayerNorm) -> Norm:
        """A layer norm with its vectors."""
        return Norm(True, norm.eps, self._vector(norm.weight), self._vector(norm.bias))

    def linear(self, op: ops.Linear) -> PackedLinear:
        """The stacked matrices of an operation."""
        parts = [self._weights.shape(name)[0] for name in op.weight]
        # Equal parts, and geglu's values and gates, start on tiles of their own.
        group = parts[0] if len(parts) > 1 and len(set(parts)) == 1 else 0
        if op.activation == "geglu":
            group = sum(parts) // 2
        key = (op.weight, group)
        if key not in self._linears:
            self._linears[key] = self._pack_linear(op, group)
        return self._linears[key]

    def conv(self, op: ops.Conv) -> PackedConv:
        """The weights of a convolution, as its method wants them."""
        key = (op.weight, op.sources[0].channels, op.stride, op.upsample)
        if key not in self._convs:
            self._convs[key] = self._pack_conv(op)
        packed = self._convs[key]
        shape = self._options.conv_shape(op, is_integer=packed.quantization is not None)
        return packed_conv(shape, packed.weights, packed.bias, packed.quantization)

    def forget(self, names: Collection[str]) -> None:
        """Let go of what was packed of these tensors; programs that use it keep it alive."""
        gone = set(names)
        for key in [key for key in self._linears if not gone.isdisjoint(_names(key))]:
            del self._linears[key]
        for key in [key for key in self._convs if not gone.isdisjoint(_names(key))]:
            del self._convs[key]

    def _pack_linear(self, op: ops.Linear, group: int) -> PackedLinear:
        parts = [self._weights.shape(name)[0] for name in op.weight]
        total, cols = sum(parts), op.source.channels
        quantized = stacked(self._weights, op.weight)
        if quantized is None:
            shape = self._options.storage(op).shape(total, cols, group)
            packed, given = self._memory(shape.packed_bytes), LinearInput()
            self._pack_floats(op, parts, shape, packed, group)
        else:
            shape = linear_storage(quantized, op.name).shape(total, cols, group)
            packed, given = self._memory(shape.packed_bytes), linear_input(quantized)
            pack_codes(shape, linear_codes(quantized), packed, self._pool)
        for name in op.weight:
            self._weights.release(name)
        bias = None
        if op.bias:
            rows = self._bias(op.bias).reshape(-1, group or total)
            bias = np.pad(rows, ((0, 0), (0, -rows.shape[1] % TILE_ROWS))).reshape(-1)
        return packed_linear(shape, packed, bias, given)

    def _pack_floats(
        self, op: ops.Linear, parts: list[int], shape: LinearShape, packed: Packed, group: int
    ) -> None:
        cols = op.source.channels
        if len(parts) == 1:
            pack_floats(shape, self._matrix(op.weight[0], cols), packed, self._pool)
        elif group == parts[0] or all(part % TILE_ROWS == 0 for part in parts):
            first = 0
            for name, part in zip(op.weight, parts, strict=True):
                own = self._options.storage(op).shape(part, cols)
                slot = packed[first : first + own.packed_bytes]
                pack_floats(own, self._matrix(name, cols), slot, self._pool)
                self._weights.release(name)
                first += own.packed_bytes
        else:
            matrix = np.concatenate([self._matrix(name, cols) for name in op.weight])
            pack_floats(shape, matrix, packed, self._pool)

    def _pack_conv(self, op: ops.Conv) -> _PackedConv:
        quantized = stacked(self._weights, op.weight)
        shape = self._options.conv_shape(op, is_integer=quantized is not None)
        size = (-1, shape.in_channels, op.size, op.size)
        packed = self._memory(shape.packed_bytes)
        quantization = None
        if quantized is None:
            parts = [self._weights.float32(name).reshape(size) for name in op.weight]
            values = parts[0] if len(parts) == 1 else np.concatenate(parts)
            pack_conv(shape, np.ascontiguousarray(values), packed, self._pool)
        else:
            quantization = conv_quantization(quantized, op.name)
            codes = np.ascontiguousarray(quantized.values.reshape(size))
            pack_conv_codes(shape, codes, packed, self._pool)
        for name in op.weight:
            self._weights.release(name)
        return _PackedConv(packed, self._bias(op.bias) if op.bias else None, quantization)

    def _matrix(self, name: str, cols: int) -> ops.Array:
        return np.ascontiguousarray(self._weights.float32(name).reshape(-1, cols))

    def _bias(self, names: tuple[str, ...]) -> ops.Array:
        return np.concatenate([self._weights.float32(name).reshape(-1) for name in names])

    def _vector(self, name: str) -> ops.Array:
        if name not in self._vectors:
            self._vectors[name] = np.array(self._weights.float32(name), np.float32).reshape(-1)
        return self._vectors[name]

    def _memory(self, num_bytes: int) -> Packed:
        self.packed_bytes += num_bytes
        memory = np.empty(num_bytes + 64, np.uint8)
        skip = -memory.ctypes.data % 64  # tiles on whole cache lines
        return memory[skip : skip + num_bytes]


def _names(key: tuple[object, ...]) -> tuple[str, ...]:
    """The tensors of a packed weight, which come first in its key."""
    names = key[0]
    assert isinstance(names, tuple)
    return names
