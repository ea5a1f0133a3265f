"""A model in one GGUF file."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fuserve.checkpoints.gguf_header import read_gguf_header
from fuserve.checkpoints.layout import TensorLayout, missing_tensor
from fuserve.checkpoints.mapped_file import MappedFile
from fuserve.checkpoints.tensor import Tensor
from fuserve.quantization import QuantScheme


class GgufFile:
    """See ``Checkpoint``. Shapes are ``[out, in]``, the reverse of ggml's order."""

    format: Literal["gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self._header = read_gguf_header(self._file)
        self.metadata: dict[str, Any] = self._header.metadata
        self.generation_config: dict[str, Any] = {}

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the file."""
        return tuple(self._header.layouts)

    def __contains__(self, name: object) -> bool:
        return name in self._header.layouts

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return self._layout(name).shape

    def dtype(self, name: str) -> str:
        """Stored type of a tensor."""
        return self._layout(name).dtype

    def num_bytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        layout = self._layout(name)
        return layout.stop - layout.start

    def scheme(self, name: str) -> QuantScheme | None:
        """None: a GGUF's block types are dtypes."""
        return None

    def vectors(self, name: str) -> frozenset[str]:
        """Empty, as no tensor has a scheme."""
        return frozenset()

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped bytes."""
        return self._layout(name).read(self._file)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        layout = self._layout(name)
        self._file.release(layout.start, layout.stop)

    def content_key(self) -> str:
        """Digest of the file's size, its header and samples of every tensor."""
        return self._content_key

    @cached_property
    def _content_key(self) -> str:
        digest = hashlib.sha256(self._file.size.to_bytes(8, "little"))
        digest.update(self._file.map[: self._header.data_start])
        layouts = self._header.layouts.values()
        for sample in self._file.samples((one.start, one.stop) for one in layouts):
            digest.update(sample)
        return digest.hexdigest()

    def _layout(self, name: str) -> TensorLayout:
        try:
            return self._header.layouts[name]
        except KeyError:
            raise missing_tensor(name, self._header.layouts, self.path) from None
