"""What the config.json of several families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    kv_heads_of,
)
from fuserve.architectures.rope_config import extended_max_position, rope_from_config
from fuserve.architectures.spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from fuserve.architectures.weight_map import Template

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

LLAMA_TENSORS: dict[str, Template] = {
    "embedding": "embed_tokens",
    "attn_norm": "layers.{i}.input_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "o": "layers.{i}.self_attn.o_proj",
    "ffn_norm": "layers.{i}.post_attention_layernorm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "down": "layers.{i}.mlp.down_proj",
    "final_norm": "norm",
}
"""Names inside ``model.`` shared by the families that descend from Llama."""


def llama_like(
    config: Fields,
    family: str,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    ffn_bias: bool = False,
    tied_by_default: bool = False,
    default_eps: float = 1e-6,
    rope: Callable[[int, int], RopeSpec] | None = None,
    windows: Callable[[int], tuple[int | None, ...]] | None = None,
) -> DecoderSpec:
    """The spec of a pre-norm, RMSNorm, gated decoder.

    Args:
        config: the model's config.
        family: the spec's family name.
        qkv_bias, output_bias, ffn_bias: which linear layers have biases.
        tied_by_default: the family's ``tie_word_embeddings`` where the config is silent.
        default_eps: the family's ``rms_norm_eps``.
        rope: ``(head_dim, max_position) -> RopeSpec``; by default plain config fields.
        windows: ``num_layers -> sliding window of each layer``; by default none.
    """
    hidden_size = config.integer("hidden_size", high=MAX_HIDDEN_SIZE)
    num_heads = config.integer("num_attention_heads", high=MAX_HEADS)
    head_dim = head_dim_of(config, "head_dim", hidden_size, num_heads)
    num_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    max_position = config.integer("max_position_embeddings", high=MAX_POSITION)
    if rope is None:
        rope_spec = rope_from_config(config, head_dim, max_position)
    else:
        rope_spec = rope(head_dim, max_position)
    layer_windows = windows(num_layers) if windows is not None else (None,) * num_layers
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size", high=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        max_position=extended_max_position(max_position, rope_spec.scaling),
        norm=NormSpec("rms", config.number("rms_norm_eps", default_eps, high=1.0)),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=kv_heads_of(config, "num_key_value_heads", num_heads),
            head_dim=head_dim,
            scale=inverse_sqrt(head_dim),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        ),
        feed_forward=FeedForwardSpec(
            size=config.integer("intermediate_size", high=MAX_FEED_FORWARD_SIZE),
            gated=True,
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            bias=ffn_bias,
        ),
        layers=tuple(LayerSpec(rope_spec, window) for window in layer_windows),
        tied_head=config.flag("tie_word_embeddings", tied_by_default),
    )


def layer_types(config: Fields, num_layers: int) -> tuple[str, ...] | None:
    """The config's list ``layer_types``, or None if it has none."""
    types = config.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, (list, tuple))
        or len(types) != num_layers
        or any(kind not in known for kind in types)
    ):
        config.refuse("layer_types", f"a list of {num_layers} entries out of {known}")
    return tuple(types)


def windows_of(
    config: Fields, types: tuple[str, ...], window: int | None
) -> tuple[int | None, ...]:
    """The sliding window of each layer, from its type."""
    if window is None and "sliding_attention" in types:
        config.refuse("sliding_window", "an integer, as layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def qwen_windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: ``use_sliding_window`` from layer ``max_window_layers`` on."""
    window = None
    if config.flag("use_sliding_window", False):
        window = config.optional_integer("sliding_window", high=MAX_POSITION)
    types = layer_types(config, num_layers)
    if types is None:
        first = config.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return windows_of(config, types, window)


def with_prefix(prefix: str, templates: Mapping[str, Template]) -> dict[str, Template]:
    """``templates`` with ``prefix`` put before every stored name."""
    return {
        key: prefix + template
        if isinstance(template, str)
        else replace(template, name=prefix + template.name)
        for key, template in templates.items()
    }
