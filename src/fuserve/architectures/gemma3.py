"""Gemma 3, text (arXiv 2503.19786): five windowed layers to one global, each with its own base."""

from __future__ import annotations

from dataclasses import replace

from fuserve.architectures import gemma2
from fuserve.architectures.fields import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    MAX_POSITION,
    Fields,
    inverse_sqrt,
)
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import (
    ACTIVATIONS,
    layer_types,
    llama_like,
    windows_of,
    with_prefix,
)
from fuserve.architectures.rope_config import rope_from_config
from fuserve.architectures.spec import DecoderSpec, LayerSpec, RopeSpec
from fuserve.architectures.weight_map import (
    Template,
    TensorSource,
    map_tensors,
    stored_prefix,
)

NUM_LAYERS_27B = 62
LOCAL_BASE = 10_000.0
GLOBAL_BASE = 1_000_000.0

# Published configs leave out what equals these defaults of the architecture.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}

TENSORS: dict[str, Template] = gemma2.TENSORS | {
    "q_norm": TensorSource("layers.{i}.self_attn.q_norm", add=1.0),
    "k_norm": TensorSource("layers.{i}.self_attn.k_norm", add=1.0),
}


def spec_from_config(config: Fields) -> DecoderSpec:
    """A text config, or the ``text_config`` inside a multimodal one."""
    config = (config.nested("text_config") or config).with_defaults(DEFAULTS)
    config.require_off("use_bidirectional_attention")
    attention_bias = config.flag("attention_bias", False)
    spec = llama_like(
        config,
        "gemma3",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        tied_by_default=True,
        rope=lambda head_dim, position: _config_rope(config, head_dim, position, "full_attention"),
        windows=lambda num_layers: _windows(config, num_layers),
    )
    local = _config_rope(config, spec.attention.head_dim, spec.max_position, "sliding_attention")
    scale_of = config.number("query_pre_attn_scalar", 256.0, high=MAX_HEAD_DIM * 64)
    attention = replace(
        spec.attention,
        scale=inverse_sqrt(scale_of),
        qk_norm=spec.norm,
        score_softcap=config.optional_number("attn_logit_softcapping"),
    )
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    spec = replace(
        spec,
        # Unlike elsewhere, the limit in Gemma 3's config is that after the stretching.
        max_position=config.integer("max_position_embeddings", high=MAX_POSITION),
        attention=attention,
        feed_forward=replace(spec.feed_forward, activation=activation),
        layers=_with_local_rope(spec.layers, local),
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )
    return gemma2.gemma(spec)


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Gemma 2's names and the two norms; multimodal checkpoints nest them deeper."""
    prefixes = ("model.", "language_model.model.", "model.language_model.", "")
    prefix = stored_prefix(names, prefixes, "embed_tokens.weight")
    head = "language_model.lm_head" if prefix == prefixes[1] else "lm_head"
    return map_tensors(spec, with_prefix(prefix, TENSORS) | {"head": head})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``gemma3``; the conversion has added one to the norm weights."""
    spec = gguf_spec(model, "gemma3")
    fields = model.fields
    window = fields.optional_integer("attention.sliding_window", high=MAX_POSITION)
    pattern = fields.integer("attention.sliding_window_pattern", 6, high=MAX_LAYERS)
    layers = tuple(
        replace(layer, sliding_window=window if (i + 1) % pattern else None)
        for i, layer in enumerate(spec.layers)
    )
    local_base = fields.number("rope.freq_base_swa", LOCAL_BASE, above=1.0)
    local = RopeSpec(spec.attention.head_dim, local_base)
    attention = replace(spec.attention, qk_norm=spec.norm)
    if spec.num_layers == NUM_LAYERS_27B:  # the one size whose scale is not that of its head
        scale = inverse_sqrt(spec.hidden_size / spec.attention.num_heads)
        attention = replace(attention, scale=scale)
    spec = replace(
        spec,
        max_position=fields.integer("context_length", high=MAX_POSITION),
        attention=attention,
        layers=_with_local_rope(layers, local),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
    )
    return gemma2.gemma(spec)


def _config_rope(config: Fields, head_dim: int, max_position: int, layer_type: str) -> RopeSpec:
    """transformers 5 has parameters per layer type; 4 has ``rope_local_base_freq`` beside them."""
    is_local = layer_type == "sliding_attention"
    if not is_local or config.nested("rope_parameters") is not None:
        return rope_from_config(
            config,
            head_dim,
            max_position,
            default_base=LOCAL_BASE if is_local else GLOBAL_BASE,
            layer_type=layer_type,
        )
    return RopeSpec(head_dim, config.number("rope_local_base_freq", LOCAL_BASE, above=1.0))


def _with_local_rope(layers: tuple[LayerSpec, ...], local: RopeSpec) -> tuple[LayerSpec, ...]:
    return tuple(
        layer if layer.sliding_window is None else replace(layer, rope=local) for layer in layers
    )


def _windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    window = config.integer("sliding_window", high=MAX_POSITION)
    types = layer_types(config, num_layers)
    if types is not None:
        return windows_of(config, types, window)
    pattern = config.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))
