"""Phi-3 and Phi-4-mini (arXiv 2404.14219): Llama with stacked projections and LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures.fields import MAX_POSITION, Fields
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import LLAMA_TENSORS, llama_like, with_prefix
from fuserve.architectures.rope_config import rope_from_config
from fuserve.architectures.spec import DecoderSpec, RopeSpec
from fuserve.architectures.weight_map import (
    TensorSource,
    map_tensors,
    stacked,
    stacked_qkv,
    stored_prefix,
)


def spec_from_config(config: Fields) -> DecoderSpec:
    """Phi-3's config; its window holds for every layer."""
    window = config.optional_integer("sliding_window", high=MAX_POSITION)
    return llama_like(
        config,
        "phi3",
        default_eps=1e-5,
        rope=lambda head_dim, max_position: _rope(config, head_dim, max_position),
        windows=lambda num_layers: (window,) * num_layers,
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Llama's names, but for the stacked ``qkv_proj`` and ``gate_up_proj``."""
    size = spec.feed_forward.size
    inner = (
        LLAMA_TENSORS
        | stacked_qkv("layers.{i}.self_attn.qkv_proj", spec)
        | stacked("layers.{i}.mlp.gate_up_proj", ("gate", "up"), (size, size))
    )
    prefix = stored_prefix(names, ("model.", ""), "embed_tokens.weight")
    return map_tensors(spec, with_prefix(prefix, inner) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``phi3``; files of full-attention models have a window of 0 or none."""
    spec = gguf_spec(model, "phi3")
    window = model.fields.optional_integer("attention.sliding_window", low=0, high=MAX_POSITION)
    layers = tuple(replace(layer, sliding_window=window or None) for layer in spec.layers)
    return replace(spec, layers=layers)


def _rope(config: Fields, head_dim: int, max_position: int) -> RopeSpec:
    rope = rope_from_config(config, head_dim, max_position, partial=True)
    if rope.scaling is not None and rope.scaling.kind != "longrope":
        config.refuse("rope_scaling", "no scaling or longrope for this architecture")
    return rope
