"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from fuserve.architectures.fields import Fields
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import llama_like, qwen_windows
from fuserve.architectures.llama import config_tensors as config_tensors
from fuserve.architectures.spec import DecoderSpec


def spec_from_config(config: Fields) -> DecoderSpec:
    """Qwen2's config."""
    return llama_like(
        config,
        "qwen2",
        qkv_bias=True,
        windows=lambda num_layers: qwen_windows(config, num_layers),
    )


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``qwen2``."""
    return gguf_spec(model, "qwen2")
