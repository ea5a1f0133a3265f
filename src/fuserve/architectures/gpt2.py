"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, weights stored transposed."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures.fields import (
    MAX_FEED_FORWARD_SIZE,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB_SIZE,
    Fields,
    head_dim_of,
    inverse_sqrt,
)
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import ACTIVATIONS, with_prefix
from fuserve.architectures.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
)
from fuserve.architectures.weight_map import (
    Template,
    TensorSource,
    map_tensors,
    stacked_qkv,
    stored_prefix,
)

TENSORS: dict[str, Template] = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "attn_norm": "h.{i}.ln_1",
    "o": TensorSource("h.{i}.attn.c_proj", transpose=True),
    "ffn_norm": "h.{i}.ln_2",
    "up": TensorSource("h.{i}.mlp.c_fc", transpose=True),
    "down": TensorSource("h.{i}.mlp.c_proj", transpose=True),
    "final_norm": "ln_f",
}


def spec_from_config(config: Fields) -> DecoderSpec:
    """GPT-2's config, with its own names."""
    config.require_off("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    hidden_size = config.integer("n_embd", high=MAX_HIDDEN_SIZE)
    num_heads = config.integer("n_head", high=MAX_HEADS)
    if hidden_size % num_heads:
        config.refuse("n_head", f"a divisor of n_embd, {hidden_size}")
    head_dim = head_dim_of(config, "head_dim", hidden_size, num_heads)
    is_scaled = config.flag("scale_attn_weights", True)
    return DecoderSpec(
        family="gpt2",
        vocab_size=config.integer("vocab_size", high=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        max_position=config.integer("n_positions", high=MAX_POSITION),
        norm=NormSpec("layer", config.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=inverse_sqrt(head_dim) if is_scaled else 1.0,
            qkv_bias=True,
            output_bias=True,
        ),
        feed_forward=FeedForwardSpec(
            size=config.integer("n_inner", 4 * hidden_size, high=MAX_FEED_FORWARD_SIZE),
            gated=False,
            activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
            bias=True,
        ),
        layers=(LayerSpec(rope=None),) * config.integer("n_layer", high=MAX_LAYERS),
        learned_position_offset=0,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """GPT-2's names; the published files have no outer ``transformer.``."""
    qkv = {
        key: replace(source, transpose=True)
        for key, source in stacked_qkv("h.{i}.attn.c_attn", spec).items()
        if isinstance(source, TensorSource)
    }
    prefix = stored_prefix(names, ("transformer.", ""), "wte.weight")
    return map_tensors(spec, with_prefix(prefix, TENSORS | qkv) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``gpt2``; the conversion has transposed the weights."""
    spec = gguf_spec(model, "gpt2", norm="layer", gated=False, has_rope=False)
    return replace(spec, learned_position_offset=0)
