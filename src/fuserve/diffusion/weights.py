"""Where programs find their tensors: in checkpoints under stored names, or in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints import to_float32
from fuserve.checkpoints.layout import missing_tensor
from fuserve.checkpoints.quantized.stored_layer import StoredLayer
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.program import Array, Program, Weights
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.errors import CheckpointError
from fuserve.quantization import QuantizedLinear


@dataclass(frozen=True, slots=True)
class StoredName:
    """Where a tensor lies in a checkpoint of other names.

    Attributes:
        name: the stored tensor.
        rows: which of its rows, as (part, of how many equal parts); all where None.
        transposed: it is stored as ``[in, out]``.
    """

    name: str
    part: tuple[int, int] | None = None
    transposed: bool = False


class CheckpointWeights:
    """The tensors of one network, read as they are asked for. See ``Weights``.

    Args:
        stored: the opened files.
        names: where each tensor lies whose name is not the stored one.
        layers: what is stored quantized, by the names of the weights.
    """

    def __init__(
        self,
        stored: StoredTensors,
        names: Mapping[str, StoredName] | None = None,
        layers: Mapping[str, StoredLayer] | None = None,
    ) -> None:
        self.stored = stored
        self._names = names or {}
        self._layers = layers or {}

    @property
    def path(self) -> Path:
        """Where the tensors are, for messages."""
        return self.stored.path

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._layers or self._place(name).name in self.stored

    @property
    def has_layers(self) -> bool:
        """Whether any tensor is quantized."""
        return bool(self._layers)

    def layer(self, name: str) -> StoredLayer | None:
        """How a quantized tensor is stored."""
        return self._layers.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        layer, place = self._layers.get(name), self._place(name)
        if layer is not None and place.name not in self.stored:
            return layer.shape
        shape = self.stored.shape(place.name)
        if place.transposed:
            shape = shape[::-1]
        if place.part is not None:
            shape = (shape[0] // place.part[1], *shape[1:])
        return shape

    def float32(self, name: str) -> Array:
        """The tensor's values; F32 stays a view of the file where it can."""
        quantized = self.quantized(name)
        if quantized is not None:
            return quantized.float32()
        place = self._place(name)
        values = to_float32(self.stored.tensor(place.name))
        if place.transposed:
            values = np.ascontiguousarray(values.T)
        if place.part is not None:
            part, count = place.part
            rows = len(values) // count
            values = values[part * rows : (part + 1) * rows]
        return values

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as integers, if it is stored as such."""
        layer = self._layers.get(name)
        return None if layer is None else _as_stored(layer.piece(None, None), self.shape(name))

    def rows(self, name: str, indices: npt.NDArray[np.int64]) -> Array:
        """Some rows of a matrix that is stored as it is wanted; only they are read.  # [n, ...]"""
        stored = self.stored.tensor(self._place(name).name)
        return to_float32(stored.take(indices.reshape(-1)))

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor that no program names. Raises CheckpointError."""
        if self.shape(name) != shape:
            raise CheckpointError(
                f"has the shape {list(self.shape(name))}, but the config asks for {list(shape)}.",
                file=self.path,
                tensor=name,
                remedy="Config and weights are of different models: fetch both again.",
            )

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        layer = self._layers.get(name)
        for part in (self._place(name).name,) if layer is None else layer.parts:
            self.stored.release(part)

    def _place(self, name: str) -> StoredName:
        return self._names.get(name) or StoredName(name)


class ArrayWeights:
    """Tensors in memory. See ``Weights``."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.float32(name).shape

    def float32(self, name: str) -> Array:
        """The tensor itself."""
        try:
            return self._arrays[name]
        except KeyError:
            raise missing_tensor(name, self._arrays, Path("memory")) from None

    def quantized(self, name: str) -> QuantizedWeight | None:
        """None: every tensor is a float one."""
        return None

    def release(self, name: str) -> None:
        """Nothing: the caller owns the memory."""


class OverlaidWeights:
    """Tensors of ``above`` where it has them, else of ``below``. See ``Weights``."""

    def __init__(self, above: ArrayWeights, below: Weights) -> None:
        self._above, self._below = above, below

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._of(name).shape(name)

    def float32(self, name: str) -> Array:
        """The tensor's values."""
        return self._of(name).float32(name)

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as integers, if it is stored as such."""
        return self._of(name).quantized(name)

    def release(self, name: str) -> None:
        """Let go of the tensor's pages."""
        self._of(name).release(name)

    def _of(self, name: str) -> Weights:
        return self._above if name in self._above else self._below


def _as_stored(layer: QuantizedLinear, shape: tuple[int, ...]) -> QuantizedWeight:
    """A layer that was read over patches, in the shape of its tensor."""
    codes, scheme = layer.codes.codes, layer.scheme
    values = codes.view(np.int8) if scheme.weight_bits == 8 else codes.astype(np.int8) - np.int8(8)
    smoothing = layer.input_smoothing
    if smoothing is not None:
        smoothing = np.float32(1) / smoothing[:: layer.shape[1] // shape[1]]
    return QuantizedWeight(
        values.reshape(shape),
        layer.codes.scales,
        scheme.weight_bits,
        scheme.group_size,
        layer.input_scale,
        smoothing,
    )


def check_weights(programs: Iterable[Program], weights: Weights, path: Path) -> None:
    """Check that every tensor is there and fits, before the first is read.

    Raises:
        CheckpointError: naming the tensor, its shape and the one that the config asks for.
    """
    for program in programs:
        for op, names, shape in program.weight_shapes():
            stored = [weights.shape(name) for name in names]
            rows = sum(one[0] if one else 0 for one in stored)
            fits = rows == shape[0] and all(
                math.prod(one[1:]) == math.prod(shape[1:]) for one in stored
            )
            if not fits:
                raise CheckpointError(
                    f"has the shape {' + '.join(map(str, stored))}, but the config of {op.name} "
                    f"asks for {list(shape)}.",
                    file=path,
                    tensor=names[0],
                    remedy="Config and weights are of different models: fetch both again.",
                )
