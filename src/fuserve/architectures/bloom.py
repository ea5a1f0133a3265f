"""BLOOM (arXiv 2211.05100): ALiBi, a norm after the embedding, QKV fused head by head."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures.fields import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB_SIZE,
    Fields,
    inverse_sqrt,
)
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import with_prefix
from fuserve.architectures.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
)
from fuserve.architectures.weight_map import (
    PerHead,
    Template,
    TensorSource,
    map_tensors,
    stored_prefix,
)

TRAINED_LENGTH = 2048

TENSORS: dict[str, Template] = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "attn_norm": "h.{i}.input_layernorm",
    "o": "h.{i}.self_attention.dense",
    "ffn_norm": "h.{i}.post_attention_layernorm",
    "up": "h.{i}.mlp.dense_h_to_4h",
    "down": "h.{i}.mlp.dense_4h_to_h",
    "final_norm": "ln_f",
}


def spec_from_config(config: Fields) -> DecoderSpec:
    """BLOOM's config, in which sizes have two names each."""
    config.require_off("apply_residual_connection_post_layernorm")
    hidden_size = config.integer(_either(config, "hidden_size", "n_embed"), high=MAX_HIDDEN_SIZE)
    heads_field = _either(config, "n_head", "num_attention_heads")
    num_heads = config.integer(heads_field, high=MAX_HEADS)
    if hidden_size % num_heads:
        config.refuse(heads_field, f"a divisor of the hidden size, {hidden_size}")
    head_dim = hidden_size // num_heads
    num_layers = config.integer(_either(config, "n_layer", "num_hidden_layers"), high=MAX_LAYERS)
    return DecoderSpec(
        family="bloom",
        vocab_size=config.integer("vocab_size", high=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        max_position=config.integer("seq_length", TRAINED_LENGTH, high=MAX_POSITION),
        norm=NormSpec("layer", config.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=inverse_sqrt(head_dim),
            qkv_bias=True,
            output_bias=True,
            alibi=True,
        ),
        feed_forward=FeedForwardSpec(
            4 * hidden_size, gated=False, activation="gelu_tanh", bias=True
        ),
        layers=(LayerSpec(rope=None),) * num_layers,
        embedding_norm=True,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """BLOOM's names; the published files have no outer ``transformer.``."""
    num_heads = spec.attention.num_heads
    qkv: dict[str, Template] = {
        key: TensorSource("h.{i}.self_attention.query_key_value", per_head=PerHead(num_heads, 3, i))
        for i, key in enumerate(("q", "k", "v"))
    }
    prefix = stored_prefix(names, ("transformer.", ""), "word_embeddings.weight")
    return map_tensors(spec, with_prefix(prefix, TENSORS | qkv) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``bloom``; the conversion has put queries, keys and values apart."""
    spec = gguf_spec(model, "bloom", norm="layer", gated=False, has_rope=False)
    return replace(spec, attention=replace(spec.attention, alibi=True), embedding_norm=True)


def _either(config: Fields, first: str, second: str) -> str:
    return first if config.get(first) is not None else second
