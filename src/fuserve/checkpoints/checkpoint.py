"""What every checkpoint format offers, and opening one from a model argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from fuserve.checkpoints.find import find_model
from fuserve.checkpoints.gguf_file import GgufFile
from fuserve.checkpoints.quantized import QuantizedFolder
from fuserve.checkpoints.safetensors_folder import SafetensorsFolder
from fuserve.checkpoints.tensor import Tensor
from fuserve.quantization import QuantScheme


class Checkpoint(Protocol):
    """An opened checkpoint: its config is read and checked, its weights are mapped, not read."""

    @property
    def path(self) -> Path:
        """The folder, or the ``.gguf`` file."""
        ...

    @property
    def format(self) -> Literal["huggingface", "gguf"]:
        """How ``metadata`` and the tensor names are to be understood."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """``config.json``, or all GGUF metadata as plain Python values."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """``generation_config.json``; empty where there is none."""
        ...

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the file."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, ``[out_features, in_features]`` for a linear weight."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type, as in ``Tensor.dtype``."""
        ...

    def num_bytes(self, name: str) -> int:
        """Stored bytes of a tensor, everything that belongs to it included."""
        ...

    def scheme(self, name: str) -> QuantScheme | None:
        """The scheme of a linear weight that the checkpoint has quantized (not GGUF's blocks)."""
        ...

    def vectors(self, name: str) -> frozenset[str]:
        """Which of its vectors (``QuantizedLinear``'s names) a quantized weight has."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A read-only view of the mapped bytes. Raises CheckpointError for an unknown name."""
        ...

    def release(self, name: str) -> None:
        """Let go of the tensor's resident pages; they are read again when touched."""
        ...

    def content_key(self) -> str:
        """Hex digest that changes with the config or the weights, and not with time or place."""
        ...


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a local folder, a ``.gguf`` file, a hub id, or ``"demo"``.

    Raises:
        ModelNotFoundError: nothing of that name is here or on the hub.
        CheckpointError: it is damaged, incomplete, or in a form that is refused.
        UnsupportedModelError: a tensor has a type that fuserve cannot read.
    """
    path = find_model(model)
    if path.is_file():
        return GgufFile(path)
    folder = SafetensorsFolder(path)
    config = folder.metadata.get("quantization_config")
    return QuantizedFolder(folder, config) if config else folder
