"""A checkpoint in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints import Tensor
from fuserve.quantization import QuantScheme

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


class FakeCheckpoint:
    """Implements ``fuserve.checkpoints.Checkpoint`` over arrays."""

    path = Path("/models/fake")
    generation_config: Mapping[str, Any] = {}

    def __init__(
        self,
        metadata: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[np.generic]],
        format: Literal["huggingface", "gguf"] = "huggingface",
    ) -> None:
        self.metadata = metadata
        self.format: Literal["huggingface", "gguf"] = format
        self.arrays = dict(arrays)
        self.released: list[str] = []

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        return DTYPES.get(self.arrays[name].dtype.name, "I8")

    def num_bytes(self, name: str) -> int:
        return self.arrays[name].nbytes

    def scheme(self, name: str) -> QuantScheme | None:
        return None

    def vectors(self, name: str) -> frozenset[str]:
        return frozenset()

    def tensor(self, name: str) -> Tensor:
        return Tensor(name, self.dtype(name), self.shape(name), self.arrays[name])

    def release(self, name: str) -> None:
        self.released.append(name)

    def content_key(self) -> str:
        return "fake"
