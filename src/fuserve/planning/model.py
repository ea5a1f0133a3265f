"""The model that a plan is of: a checkpoint's headers, or a config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from fuserve.architectures import DecoderSpec, tensor_shapes
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.load import read_config
from fuserve.decoder.model_part import Span
from fuserve.decoder.options import ExecutorOptions, KVCacheDtype, Quantization
from fuserve.decoder.weights import CheckpointWeights, DecoderWeights, spec_from_config
from fuserve.errors import ModelNotFoundError
from fuserve.quantization import QuantScheme

CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""By config.json's ``dtype`` or ``torch_dtype``."""


class ConfigWeights:
    """The weights that a config.json describes: names, shapes and types, no values.

    Raises:
        UnsupportedModelError: the architecture, or a field of the config, is not supported.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        self.spec: DecoderSpec = spec_from_config(config)
        self._shapes = tensor_shapes(self.spec)
        stored = config.get("dtype") or config.get("torch_dtype")
        self._dtype = CONFIG_DTYPES.get(str(stored).removeprefix("torch."), "BF16")

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def dtype(self, name: str) -> str:
        """The config's type for matrices, ``F32`` for vectors."""
        return self._dtype if len(self._shapes[name]) > 1 else "F32"

    def scheme(self, name: str) -> QuantScheme | None:
        """None: nothing is quantized."""
        return None

    def vectors(self, name: str) -> frozenset[str]:
        """Empty: nothing is quantized."""
        return frozenset()

    def tensor(self, name: str, rows: Span | None = None, cols: Span | None = None) -> NoReturn:
        """There are no values.

        Raises:
            ModelNotFoundError: always.
        """
        raise ModelNotFoundError(f"{name} has no values: only a config.json was given")

    def release(self, name: str) -> None:
        """Nothing is kept of any tensor."""


def open_for_planning(model: str) -> DecoderWeights:
    """A model by any name that ``load_model`` takes, or a config.json, alone in its folder.

    Raises:
        FuserveError: as ``open_checkpoint``; the config cannot be read or is not supported.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return ConfigWeights(read_config(path))
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return ConfigWeights(read_config(path))
    return CheckpointWeights(open_checkpoint(model))


def schemes_of(
    weights: DecoderWeights,
    quantization: Quantization | None,
    group_size: int | None,
    quantize_embeddings: bool,
    kv_cache_dtype: KVCacheDtype,
) -> dict[str, ExecutorOptions]:
    """The ways to hold a model that a plan tries, by name.

    Args:
        weights: of the model; a quantized one is held as it is.
        quantization: the only one to try; None tries the stored type, int8 and int4.
        group_size: as in ``ExecutorOptions``.
        quantize_embeddings: as in ``ExecutorOptions``, where something is quantized.
        kv_cache_dtype: as in ``ExecutorOptions``.
    """
    names = [name for name in tensor_shapes(weights.spec) if name.startswith("layers.0.")]
    is_quantized = any(weights.scheme(name) is not None for name in names)
    stored = "as stored" if is_quantized else weights.dtype("layers.0.o").lower()
    choices: dict[str, Quantization | None] = {stored: None, "int8": "int8", "int4": "int4"}
    if quantization is not None:
        choices = {quantization: quantization}
    elif is_quantized:
        choices = {stored: None}
    return {
        name: ExecutorOptions(
            quantization=chosen,
            group_size=group_size if chosen else None,
            quantize_embeddings=quantize_embeddings and chosen is not None,
            kv_cache_dtype=kv_cache_dtype,
        )
        for name, chosen in choices.items()
    }
