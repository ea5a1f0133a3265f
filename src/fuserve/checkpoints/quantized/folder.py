"""A Hugging Face folder with quantized layers, in any of the layouts that are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fuserve.checkpoints.quantized.awq import awq_layers
from fuserve.checkpoints.quantized.bitsandbytes import bitsandbytes_layers
from fuserve.checkpoints.quantized.compressed_tensors import compressed_layers
from fuserve.checkpoints.quantized.gptq import gptq_layers
from fuserve.checkpoints.quantized.stored_layer import Span, StoredLayer
from fuserve.checkpoints.safetensors_folder import SafetensorsFolder
from fuserve.checkpoints.tensor import QUANTIZED, Tensor
from fuserve.errors import UnsupportedModelError
from fuserve.quantization import QuantScheme

LayersReader = Callable[[SafetensorsFolder, Mapping[str, Any]], dict[str, StoredLayer]]

READERS: dict[str, LayersReader] = {
    "compressed-tensors": compressed_layers,
    "fuserve": compressed_layers,
    "gptq": gptq_layers,
    "awq": awq_layers,
    "bitsandbytes": bitsandbytes_layers,
}
"""By ``quantization_config.quant_method``."""


class QuantizedFolder:
    """See ``Checkpoint``. The parts of a quantized layer appear as one tensor, ``X.weight``.

    Args:
        folder: the folder as it is stored.
        config: its ``quantization_config``.

    Raises:
        CheckpointError: parts of a layer are missing or do not fit together.
        UnsupportedModelError: a layout or a scheme that fuserve does not read.
    """

    format: Literal["huggingface"] = "huggingface"

    def __init__(self, folder: SafetensorsFolder, config: object) -> None:
        self._folder = folder
        self.path: Path = folder.path
        self.metadata: Mapping[str, Any] = folder.metadata
        self.generation_config: Mapping[str, Any] = folder.generation_config
        layers = _reader(folder.path, config)(folder, config if isinstance(config, dict) else {})
        self._layers = {f"{module}.weight": layer for module, layer in layers.items()}
        hidden = {part for layer in self._layers.values() for part in layer.parts}
        plain = [name for name in folder.tensor_names() if name not in hidden]
        self._names = (*plain, *self._layers)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, quantized layers last."""
        return self._names

    def __contains__(self, name: object) -> bool:
        return name in self._layers or name in self._folder

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        layer = self._layers.get(name)
        return layer.shape if layer is not None else self._folder.shape(name)

    def dtype(self, name: str) -> str:
        """Stored type of a tensor."""
        return QUANTIZED if name in self._layers else self._folder.dtype(name)

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor, scales and zero points included."""
        layer = self._layers.get(name)
        parts = layer.parts if layer is not None else (name,)
        return sum(self._folder.num_bytes(part) for part in parts)

    def scheme(self, name: str) -> QuantScheme | None:
        """The scheme of a quantized layer's weight."""
        layer = self._layers.get(name)
        return layer.scheme if layer is not None else None

    def vectors(self, name: str) -> frozenset[str]:
        """Which of its vectors a quantized layer's weight has."""
        layer = self._layers.get(name)
        return layer.vectors if layer is not None else frozenset()

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped bytes; the codes of a quantized layer are unpacked."""
        return self.piece(name) if name in self._layers else self._folder.tensor(name)

    def piece(self, name: str, rows: Span | None = None, cols: Span | None = None) -> Tensor:
        """Some outputs and inputs of a quantized layer, of which only these are read.

        ``rows`` and ``cols`` are first and stop; None is all of them. Features that share a word,
        a stored group or a page of the file are read together.
        """
        layer = self._layers[name].piece(rows, cols)
        return Tensor(name, QUANTIZED, layer.shape, layer.codes.codes, layer)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        layer = self._layers.get(name)
        for part in layer.parts if layer is not None else (name,):
            self._folder.release(part)

    def content_key(self) -> str:
        """The folder's."""
        return self._folder.content_key()


def _reader(path: Path, config: object) -> LayersReader:
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in READERS:
        raise UnsupportedModelError(
            f"{path / 'config.json'}: quantization_config.quant_method is {method!r}. Supported: "
            f"{', '.join(READERS)}; or use unquantized safetensors or a GGUF file of this model."
        )
    return READERS[method]
