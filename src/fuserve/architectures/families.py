"""Which file reads which model: from a checkpoint's metadata to spec and weight map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from fuserve.architectures import (
    bloom,
    ernie4_5,
    gemma2,
    gemma3,
    gpt2,
    llama,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from fuserve.architectures.fields import Fields
from fuserve.architectures.gguf import GgufModel, gguf_tensors
from fuserve.architectures.spec import DecoderSpec
from fuserve.architectures.weight_map import TensorSource
from fuserve.errors import UnsupportedModelError

CheckpointFormat = Literal["huggingface", "gguf"]
VectorReader = Callable[[str], tuple[float, ...]]


class ConfigFamily(Protocol):
    """A family's file, as far as config.json goes."""

    def spec_from_config(self, config: Fields) -> DecoderSpec:
        """The spec that config.json describes."""
        ...

    def config_tensors(self, spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
        """The weight map for a checkpoint that has tensors ``names``."""
        ...


CONFIG_FAMILIES: dict[str, ConfigFamily] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "ernie4_5": ernie4_5,
    "gpt2": gpt2,
    "opt": opt,
    "bloom": bloom,
}
"""By config.json's ``model_type``."""

GGUF_FAMILIES: dict[str, Callable[[GgufModel], DecoderSpec]] = {
    "llama": llama.spec_from_gguf,
    "qwen2": qwen2.spec_from_gguf,
    "qwen3": qwen3.spec_from_gguf,
    "gemma2": gemma2.spec_from_gguf,
    "gemma3": gemma3.spec_from_gguf,
    "phi3": phi3.spec_from_gguf,
    "ernie4_5": ernie4_5.spec_from_gguf,
    "gpt2": gpt2.spec_from_gguf,
    "bloom": bloom.spec_from_gguf,
}
"""By GGUF's ``general.architecture``."""


def spec_and_weight_map(
    format: CheckpointFormat,
    metadata: Mapping[str, Any],
    tensor_names: Iterable[str],
    read_vector: VectorReader | None = None,
) -> tuple[DecoderSpec, Mapping[str, TensorSource]]:
    """What the model is, and where its tensors lie.

    Args:
        format: of the checkpoint.
        metadata: config.json's content, or all GGUF metadata.
        tensor_names: all tensors of the checkpoint.
        read_vector: reads a one-dimensional tensor by name. GGUF keeps the rotary factors of
            Llama 3 and LongRoPE in tensors.

    Raises:
        UnsupportedModelError: unknown architecture, or a field out of what is supported.
    """
    names = frozenset(tensor_names)
    if format == "huggingface":
        family = _config_family(metadata)
        spec = family.spec_from_config(Fields(metadata))
        return spec, family.config_tensors(spec, names)
    model = _gguf_model(metadata, names, read_vector or _refuse_reading)
    spec = GGUF_FAMILIES[metadata["general.architecture"]](model)
    return spec, gguf_tensors(model, spec)


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a config.json alone; errors as in :func:`spec_and_weight_map`."""
    return _config_family(config).spec_from_config(Fields(config))


def _config_family(config: Mapping[str, Any]) -> ConfigFamily:
    return Fields(config).choice("model_type", CONFIG_FAMILIES)


def _gguf_model(
    metadata: Mapping[str, Any], names: frozenset[str], read_vector: VectorReader
) -> GgufModel:
    Fields(metadata).choice("general.architecture", GGUF_FAMILIES)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return GgufModel(
        fields=Fields(metadata, prefix=metadata["general.architecture"] + "."),
        num_tokens=len(tokens) if isinstance(tokens, (list, tuple)) else None,
        names=names,
        read_vector=read_vector,
    )


def _refuse_reading(name: str) -> tuple[float, ...]:
    raise UnsupportedModelError(
        f"The model's rotary factors are in tensor {name!r}, which cannot be read from metadata."
        " Open the whole checkpoint instead."
    )
