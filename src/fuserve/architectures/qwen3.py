"""Qwen3 (arXiv 2505.09388): Llama with normalized queries and keys."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures.fields import Fields
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import (
    LLAMA_TENSORS,
    llama_like,
    qwen_windows,
    with_prefix,
)
from fuserve.architectures.spec import DecoderSpec
from fuserve.architectures.weight_map import TensorSource, map_tensors, stored_prefix


def spec_from_config(config: Fields) -> DecoderSpec:
    """Qwen3's config."""
    attention_bias = config.flag("attention_bias", False)
    spec = llama_like(
        config,
        "qwen3",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        windows=lambda num_layers: qwen_windows(config, num_layers),
    )
    return _with_qk_norm(spec)


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Llama's names and the two norms."""
    prefix = stored_prefix(names, ("model.", ""), "embed_tokens.weight")
    inner = LLAMA_TENSORS | {
        "q_norm": "layers.{i}.self_attn.q_norm",
        "k_norm": "layers.{i}.self_attn.k_norm",
    }
    return map_tensors(spec, with_prefix(prefix, inner) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``qwen3``."""
    return _with_qk_norm(gguf_spec(model, "qwen3"))


def _with_qk_norm(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, attention=replace(spec.attention, qk_norm=spec.norm))
