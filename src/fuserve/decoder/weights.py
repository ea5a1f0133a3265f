"""A decoder's weights under canonical names, from a checkpoint or made up."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from fuserve import architectures
from fuserve.architectures import DecoderSpec, TensorSource, spec_and_weight_map, tensor_shapes
from fuserve.checkpoints import Checkpoint, Tensor, to_float32
from fuserve.checkpoints.quantized import QuantizedFolder
from fuserve.decoder.model_part import Span
from fuserve.errors import CheckpointError
from fuserve.quantization import QuantScheme

PLAIN_DTYPES = frozenset({"F32", "F16", "BF16"})
DUMMY_STD = 0.02
DUMMY_PERIOD = 1_048_573
"""Values drawn for dummy weights; a prime, so that the rows of a matrix differ."""


class DecoderWeights(Protocol):
    """What an executor needs to be built."""

    spec: DecoderSpec

    def __contains__(self, name: object) -> bool:
        """Whether the decoder has canonical tensor ``name``."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type of canonical tensor ``name``, without reading it."""
        ...

    def scheme(self, name: str) -> QuantScheme | None:
        """The scheme of canonical tensor ``name`` if it is quantized, without reading it."""
        ...

    def vectors(self, name: str) -> frozenset[str]:
        """Which vectors (``QuantizedLinear``'s names) belong to quantized tensor ``name``."""
        ...

    def tensor(self, name: str, rows: Span | None = None, cols: Span | None = None) -> Tensor:
        """Canonical tensor ``name``, linear weights as ``[out_features, in_features]``.

        ``rows`` and ``cols`` are first and stop of a piece of it; None is all of them.
        """
        ...

    def release(self, name: str) -> None:
        """Let go of the pages behind ``name``; it can still be read again."""
        ...


class CheckpointWeights:
    """The weights of a checkpoint, checked to be complete before the first is read.

    Block-quantized tensors stay so, unless a piece cuts through their blocks: that is float32.

    Raises:
        CheckpointError: a tensor is missing or has an unexpected shape.
        UnsupportedModelError: the architecture, or a field of the config, is not supported.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.spec, self._sources = spec_and_weight_map(
            checkpoint.format, checkpoint.metadata, checkpoint.tensor_names(), self._read_vector
        )
        self._check()

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def dtype(self, name: str) -> str:
        """The stored type of canonical tensor ``name``."""
        source = self._sources[name]
        return "F32" if source.add else self._checkpoint.dtype(source.name)

    def scheme(self, name: str) -> QuantScheme | None:
        """The scheme of canonical tensor ``name`` if it is quantized."""
        return self._checkpoint.scheme(self._sources[name].name)

    def vectors(self, name: str) -> frozenset[str]:
        """Which vectors belong to quantized tensor ``name``."""
        return self._checkpoint.vectors(self._sources[name].name)

    def tensor(self, name: str, rows: Span | None = None, cols: Span | None = None) -> Tensor:
        """Canonical tensor ``name``; a view of the file where nothing had to be computed."""
        source = self._sources[name]
        if isinstance(self._checkpoint, QuantizedFolder) and self._checkpoint.scheme(source.name):
            return self._quantized(self._checkpoint, source, rows, cols)
        tensor = self._checkpoint.tensor(source.name)
        if source.transpose:
            tensor = replace(tensor, shape=tensor.shape[::-1], data=tensor.data.T)
        if source.rows is not None:
            tensor = tensor.rows(*source.rows)
        if source.per_head is not None:
            taken = source.per_head.rows(tensor.shape[0])
            tensor = tensor.take(taken if rows is None else taken[slice(*rows)])
        elif rows is not None:
            tensor = tensor.rows(*rows)
        if cols is not None:
            tensor = _columns(tensor, cols)
        if source.transpose:
            tensor = replace(tensor, data=np.ascontiguousarray(tensor.data))
        if source.add:
            shifted = to_float32(tensor) + np.float32(source.add)
            tensor = Tensor(tensor.name, "F32", tensor.shape, shifted)
        return tensor

    def _quantized(
        self, folder: QuantizedFolder, source: TensorSource, rows: Span | None, cols: Span | None
    ) -> Tensor:
        """A layer whose parts have to be unpacked: only what is taken of it."""
        size = folder.shape(source.name)[0]
        first, stop = source.rows or (0, size)
        if source.per_head is None:
            begin, end = rows or (0, stop - first)
            return folder.piece(source.name, (first + begin, first + end), cols)
        taken = first + source.per_head.rows(stop - first)[slice(*rows or (None,))]
        around = int(taken.min()), int(taken.max()) + 1
        return folder.piece(source.name, around, cols).take(taken - around[0])

    def release(self, name: str) -> None:
        """Let go of the file pages behind ``name``."""
        self._checkpoint.release(self._sources[name].name)

    def _read_vector(self, name: str) -> tuple[float, ...]:
        shape = self._checkpoint.shape(name)
        if len(shape) != 1:
            raise CheckpointError(
                f"has shape {list(shape)}, expected one dimension.",
                file=self._checkpoint.path,
                tensor=name,
                remedy="The file is damaged; download it again.",
            )
        return tuple(to_float32(self._checkpoint.tensor(name)).tolist())

    def _check(self) -> None:
        rows_used: dict[str, tuple[int, TensorSource]] = {}
        for name, shape in tensor_shapes(self.spec).items():
            source = self._sources[name]
            self._check_one(source, shape)
            if source.rows is not None:
                stop = max(source.rows[1], rows_used.get(source.name, (0, source))[0])
                rows_used[source.name] = (stop, source)
        for stop, source in rows_used.values():
            if self._stored_shape(source)[0] != stop:
                self._refuse(source, f"{stop} stacked rows")

    def _check_one(self, source: TensorSource, expected: tuple[int, ...]) -> None:
        if source.name not in self._checkpoint:
            self._refuse(source, f"a tensor of shape {list(expected)}")
        shape = self._stored_shape(source)
        if source.rows is not None and shape and source.rows[1] <= shape[0]:
            shape = (source.rows[1] - source.rows[0], *shape[1:])
        if source.per_head is not None and shape and shape[0] % source.per_head.num_parts == 0:
            shape = (shape[0] // source.per_head.num_parts, *shape[1:])
        if shape != expected:
            self._refuse(source, f"one that holds {list(expected)}")
        dtype = self._checkpoint.dtype(source.name)
        if source.transpose and dtype not in PLAIN_DTYPES:
            self._refuse(source, "F32, F16 or BF16, as it is transposed")

    def _stored_shape(self, source: TensorSource) -> tuple[int, ...]:
        shape = tuple(self._checkpoint.shape(source.name))
        return shape[::-1] if source.transpose else shape

    def _refuse(self, source: TensorSource, expected: str) -> NoReturn:
        stored = source.name
        state = "is missing"
        if stored in self._checkpoint:
            shape, dtype = self._checkpoint.shape(stored), self._checkpoint.dtype(stored)
            state = f"has shape {list(shape)} and type {dtype}"
        raise CheckpointError(
            f"{state}, expected {expected}.",
            file=self._checkpoint.path,
            tensor=stored,
            remedy=(
                f"The config describes a {self.spec.family} model of {self.spec.num_layers} layers;"
                " download the model again, as its config and weights do not belong together."
            ),
        )


class DummyWeights:
    """Random weights of a spec, to measure a shape without a file. Equal for equal seeds.

    Linear weights and embeddings are F16 with a standard deviation of 0.02, norms are about 1 and
    biases about 0 in F32.
    """

    def __init__(self, spec: DecoderSpec, seed: int = 0) -> None:
        self.spec = spec
        self._shapes = tensor_shapes(spec)
        self._seed = seed
        normal = np.random.default_rng(seed).standard_normal(DUMMY_PERIOD, dtype=np.float32)
        self._values = (normal * np.float32(DUMMY_STD)).astype(np.float16)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def dtype(self, name: str) -> str:
        """``F16`` for matrices, ``F32`` for vectors."""
        return "F16" if len(self._shapes[name]) > 1 else "F32"

    def scheme(self, name: str) -> QuantScheme | None:
        """None: nothing is quantized."""
        return None

    def vectors(self, name: str) -> frozenset[str]:
        """Empty: nothing is quantized."""
        return frozenset()

    def tensor(self, name: str, rows: Span | None = None, cols: Span | None = None) -> Tensor:
        """Canonical tensor ``name``, made anew at every call."""
        shape = self._shapes[name]
        first, stop = rows or (0, shape[0])
        row_size = math.prod(shape[1:])
        begin = zlib.crc32(f"{self._seed}/{name}".encode()) + first * row_size
        values = self._drawn(begin, (stop - first) * row_size).reshape(-1, *shape[1:])
        if len(shape) > 1:
            tensor = Tensor(name, "F16", values.shape, values)
            return tensor if cols is None else tensor.columns(*cols)
        centre = np.float32(name.endswith("norm"))
        vector: npt.NDArray[np.float32] = values.astype(np.float32) + centre
        return Tensor(name, "F32", vector.shape, vector)

    def _drawn(self, begin: int, count: int) -> npt.NDArray[np.float16]:
        """Values from ``begin`` on, over and over  # [count]"""
        values = np.empty(count, np.float16)
        done = 0
        while done < count:
            run = self._values[(begin + done) % DUMMY_PERIOD :][: count - done]
            values[done : done + len(run)] = run
            done += len(run)
        return values

    def release(self, name: str) -> None:
        """Nothing is kept of any tensor."""


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec that a config.json describes, for loading without weights.

    Raises:
        UnsupportedModelError: the architecture, or a field of the config, is not supported.
    """
    return architectures.spec_from_config(config)


def _columns(tensor: Tensor, cols: Span) -> Tensor:
    if tensor.cuts_blocks(*cols):
        values = to_float32(tensor)
        tensor = Tensor(tensor.name, "F32", values.shape, values)
    return tensor.columns(*cols)
