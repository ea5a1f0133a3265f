"""OPT (arXiv 2205.01068): LayerNorm, learned positions from row 2 on, ReLU."""

from __future__ import annotations

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
    stored_prefix,
)

POSITION_OFFSET = 2

TENSORS: dict[str, Template] = {
    "embedding": "embed_tokens",
    "position_embedding": "embed_positions",
    "attn_norm": "layers.{i}.self_attn_layer_norm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "o": "layers.{i}.self_attn.out_proj",
    "ffn_norm": "layers.{i}.final_layer_norm",
    "up": "layers.{i}.fc1",
    "down": "layers.{i}.fc2",
    "final_norm": "final_layer_norm",
}


def spec_from_config(config: Fields) -> DecoderSpec:
    """OPT's config; ``do_layer_norm_before: false`` (350M) is the post-norm variant."""
    hidden_size = config.integer("hidden_size", high=MAX_HIDDEN_SIZE)
    if config.get("word_embed_proj_dim") not in (None, hidden_size):
        config.refuse("word_embed_proj_dim", f"the hidden size, {hidden_size}")
    if not config.flag("layer_norm_elementwise_affine", True):
        config.refuse("layer_norm_elementwise_affine", "true")
    num_heads = config.integer("num_attention_heads", high=MAX_HEADS)
    if hidden_size % num_heads:
        config.refuse("num_attention_heads", f"a divisor of hidden_size, {hidden_size}")
    head_dim = head_dim_of(config, "head_dim", hidden_size, num_heads)
    has_bias = config.flag("enable_bias", True)
    is_pre_norm = config.flag("do_layer_norm_before", True)
    return DecoderSpec(
        family="opt",
        vocab_size=config.integer("vocab_size", high=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        max_position=config.integer("max_position_embeddings", high=MAX_POSITION),
        norm=NormSpec("layer", 1e-5, bias=True),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=inverse_sqrt(head_dim),
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        feed_forward=FeedForwardSpec(
            size=config.integer("ffn_dim", high=MAX_FEED_FORWARD_SIZE),
            gated=False,
            activation=config.choice("activation_function", ACTIVATIONS, "relu"),
            bias=has_bias,
        ),
        layers=(LayerSpec(rope=None),) * config.integer("num_hidden_layers", high=MAX_LAYERS),
        residual="pre" if is_pre_norm else "post",
        learned_position_offset=POSITION_OFFSET,
        final_norm=is_pre_norm and not config.flag("_remove_final_layer_norm", False),
        tied_head=config.flag("tie_word_embeddings", True),
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """OPT's names; some files have no outer ``model.``."""
    prefix = stored_prefix(names, ("model.decoder.", "decoder."), "embed_tokens.weight")
    return map_tensors(spec, with_prefix(prefix, TENSORS) | {"head": "lm_head"})
