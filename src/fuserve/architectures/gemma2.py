"""Gemma 2 (arXiv 2408.00118): sandwich norms, soft-caps, every other layer with a window."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures.fields import MAX_HEAD_DIM, MAX_POSITION, Fields, inverse_sqrt
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import (
    ACTIVATIONS,
    LLAMA_TENSORS,
    layer_types,
    llama_like,
    windows_of,
    with_prefix,
)
from fuserve.architectures.spec import DecoderSpec
from fuserve.architectures.weight_map import (
    Template,
    TensorSource,
    map_tensors,
    stored_prefix,
)

NUM_LAYERS_27B = 46

TENSORS: dict[str, Template] = LLAMA_TENSORS | {
    "attn_norm": TensorSource("layers.{i}.input_layernorm", add=1.0),
    "post_attn_norm": TensorSource("layers.{i}.post_attention_layernorm", add=1.0),
    "ffn_norm": TensorSource("layers.{i}.pre_feedforward_layernorm", add=1.0),
    "post_ffn_norm": TensorSource("layers.{i}.post_feedforward_layernorm", add=1.0),
    "final_norm": TensorSource("norm", add=1.0),
}


def spec_from_config(config: Fields) -> DecoderSpec:
    """Gemma 2's config."""
    config.require_off("use_bidirectional_attention")
    attention_bias = config.flag("attention_bias", False)
    spec = llama_like(
        config,
        "gemma2",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        tied_by_default=True,
        windows=lambda num_layers: _windows(config, num_layers),
    )
    scale_of = config.number("query_pre_attn_scalar", 256.0, high=MAX_HEAD_DIM * 64)
    attention = replace(
        spec.attention,
        scale=inverse_sqrt(scale_of),
        score_softcap=config.optional_number("attn_logit_softcapping"),
    )
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    spec = replace(
        spec,
        attention=attention,
        feed_forward=replace(spec.feed_forward, activation=activation),
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )
    return gemma(spec)


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Llama's names, two more norms, and norm weights stored minus one."""
    prefix = stored_prefix(names, ("model.", ""), "embed_tokens.weight")
    return map_tensors(spec, with_prefix(prefix, TENSORS) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``gemma2``; the conversion has added one to the norm weights."""
    spec = gguf_spec(model, "gemma2")
    fields = model.fields
    attention = replace(
        spec.attention, score_softcap=fields.optional_number("attn_logit_softcapping")
    )
    if spec.num_layers == NUM_LAYERS_27B:  # the one size whose scale is not that of its head
        scale = inverse_sqrt(spec.hidden_size / spec.attention.num_heads)
        attention = replace(attention, scale=scale)
    window = fields.optional_integer("attention.sliding_window", high=MAX_POSITION)
    layers = tuple(
        replace(layer, sliding_window=None if i % 2 else window)
        for i, layer in enumerate(spec.layers)
    )
    softcap = fields.optional_number("final_logit_softcapping")
    return gemma(replace(spec, attention=attention, layers=layers, logit_softcap=softcap))


def gemma(spec: DecoderSpec) -> DecoderSpec:
    """What all Gemmas share: sandwich norms, scaled embeddings, GELU where SiLU was assumed."""
    feed_forward = spec.feed_forward
    if feed_forward.activation == "silu":
        feed_forward = replace(feed_forward, activation="gelu_tanh")
    return replace(
        spec,
        feed_forward=feed_forward,
        residual="sandwich",
        embedding_scale=spec.hidden_size**0.5,
    )


def _windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    window = config.integer("sliding_window", 4096, high=MAX_POSITION)
    types = layer_types(config, num_layers)
    if types is None:
        return tuple(None if layer % 2 else window for layer in range(num_layers))
    return windows_of(config, types, window)
