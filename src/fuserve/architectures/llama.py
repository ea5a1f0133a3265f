"""Llama (arXiv 2302.13971), Mistral (arXiv 2310.06825), SmolLM."""

from __future__ import annotations

from fuserve.architectures.fields import MAX_POSITION, Fields
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import LLAMA_TENSORS, llama_like, with_prefix
from fuserve.architectures.spec import DecoderSpec
from fuserve.architectures.weight_map import TensorSource, map_tensors, stored_prefix


def spec_from_config(config: Fields) -> DecoderSpec:
    """Llama's config, or Mistral's, whose window holds for every layer."""
    is_mistral = config.get("model_type") == "mistral"
    window = config.optional_integer("sliding_window", high=MAX_POSITION) if is_mistral else None
    attention_bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        "llama",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=config.flag("mlp_bias", False),
        windows=lambda num_layers: (window,) * num_layers,
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Llama's names; families that only add to them pass their spec too."""
    prefix = stored_prefix(names, ("model.", ""), "embed_tokens.weight")
    return map_tensors(spec, with_prefix(prefix, LLAMA_TENSORS) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Query and key rows are stored permuted, so rotated features are neighbours."""
    return gguf_spec(model, "llama", interleaved=True)
