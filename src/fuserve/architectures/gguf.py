"""What GGUF files of all architectures have in common: metadata keys and tensor names.

The names are llama.cpp's, from its conversion scripts and the GGUF specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
from fuserve.architectures.rope_config import extended_max_position
from fuserve.architectures.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormKind,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from fuserve.architectures.weight_map import (
    Template,
    TensorSource,
    map_tensors,
    stacked,
    stacked_qkv,
)

TENSORS: dict[str, Template] = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "embedding_norm": "token_embd_norm",
    "attn_norm": "blk.{i}.attn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "o": "blk.{i}.attn_output",
    "post_attn_norm": "blk.{i}.post_attention_norm",
    "ffn_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "post_ffn_norm": "blk.{i}.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}

UNSUPPORTED_KEYS = ("expert_count", "use_parallel_residual", "attention.clamp_kqv")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file as the families see it.

    Attributes:
        fields: the metadata of the architecture, such as ``llama.block_count`` as ``block_count``.
        num_tokens: entries of the tokenizer's vocabulary, None if the file has none.
        names: all tensors of the file.
        read_vector: reads a small tensor; rotary factors are stored as tensors.
    """

    fields: Fields
    num_tokens: int | None
    names: frozenset[str]
    read_vector: Callable[[str], tuple[float, ...]]

    def has(self, name: str) -> bool:
        """Whether the file has tensor ``name``."""
        return name in self.names


def gguf_spec(
    model: GgufModel,
    family: str,
    *,
    norm: NormKind = "rms",
    gated: bool = True,
    interleaved: bool = False,
    has_rope: bool = True,
) -> DecoderSpec:
    """The spec of a pre-norm decoder from the keys that all architectures share.

    Biases and an untied head are where the file has tensors for them. ``interleaved`` is true for
    the architectures whose rotated features llama.cpp pairs as neighbours.
    """
    fields = model.fields
    fields.require_off(*UNSUPPORTED_KEYS)
    hidden_size = fields.integer("embedding_length", high=MAX_HIDDEN_SIZE)
    num_heads = fields.integer("attention.head_count", high=MAX_HEADS)
    head_dim = head_dim_of(fields, "attention.key_length", hidden_size, num_heads)
    if fields.get("attention.value_length") not in (None, head_dim):
        fields.refuse("attention.value_length", f"the key length, {head_dim}")
    max_position = fields.integer("context_length", high=MAX_POSITION)
    rope = gguf_rope(model, head_dim, max_position, interleaved) if has_rope else None
    num_layers = fields.integer("block_count", high=MAX_LAYERS)
    eps = f"attention.layer_norm_{'rms_' if norm == 'rms' else ''}epsilon"
    return DecoderSpec(
        family=family,
        vocab_size=fields.integer("vocab_size", model.num_tokens or None, high=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        max_position=extended_max_position(max_position, rope.scaling if rope else None),
        norm=NormSpec(norm, fields.number(eps, high=1.0), bias=norm == "layer"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=kv_heads_of(fields, "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            scale=inverse_sqrt(head_dim),
            qkv_bias=model.has("blk.0.attn_q.bias") or model.has("blk.0.attn_qkv.bias"),
            output_bias=model.has("blk.0.attn_output.bias"),
        ),
        feed_forward=FeedForwardSpec(
            size=fields.integer("feed_forward_length", high=MAX_FEED_FORWARD_SIZE),
            gated=gated,
            activation="silu" if gated else "gelu_tanh",
            bias=model.has("blk.0.ffn_up.bias"),
        ),
        layers=(LayerSpec(rope),) * num_layers,
        head_bias=model.has("output.bias"),
        tied_head=not model.has("output.weight"),
    )


def gguf_rope(model: GgufModel, head_dim: int, max_position: int, interleaved: bool) -> RopeSpec:
    """The rotary embedding of a GGUF file."""
    dim = model.fields.integer("rope.dimension_count", head_dim, low=2, high=head_dim)
    if dim % 2:
        model.fields.refuse("rope.dimension_count", "an even number")
    base = model.fields.number("rope.freq_base", 10_000.0, above=1.0)
    return RopeSpec(dim, base, interleaved, _scaling(model, dim, max_position))


def _scaling(model: GgufModel, dim: int, max_position: int) -> RopeScaling | None:
    fields = model.fields
    original = fields.integer(
        "rope.scaling.original_context_length", max_position, low=2, high=MAX_POSITION
    )
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    if model.has("rope_freqs.weight"):
        # Llama 3's scaling is stored as one divisor per frequency, the same at every length.
        factors = _factors(model, "rope_freqs.weight", dim)
        return RopeScaling(
            "longrope", 1.0, original, 1.0, short_factor=factors, long_factor=factors
        )
    if model.has("rope_factors_long.weight"):
        return RopeScaling(
            "longrope",
            1.0,
            original,
            attention_factor,
            short_factor=_factors(model, "rope_factors_short.weight", dim),
            long_factor=_factors(model, "rope_factors_long.weight", dim),
        )
    kinds = {"none": "none", "linear": "linear", "yarn": "yarn", "longrope": "none"}
    kind = fields.choice("rope.scaling.type", kinds, "none")
    factor = fields.number("rope.scaling.factor", 1.0, high=1e6)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original,
            # llama.cpp multiplies the file's factor with the paper's.
            attention_factor * (0.1 * math.log(max(factor, 1.0)) + 1.0),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    if kind == "linear" and factor != 1.0:
        return RopeScaling("linear", factor, max_position)
    return None


def _factors(model: GgufModel, name: str, dim: int) -> tuple[float, ...]:
    return Fields({name: model.read_vector(name)}).numbers(name, count=dim // 2)


def gguf_tensors(model: GgufModel, spec: DecoderSpec) -> dict[str, TensorSource]:
    """The weight map of any GGUF file; stacked projections are recognized by their names."""
    templates = dict(TENSORS)
    if model.has("blk.0.attn_qkv.weight"):
        templates |= stacked_qkv("blk.{i}.attn_qkv", spec)
    if spec.feed_forward.gated and not model.has("blk.0.ffn_gate.weight"):
        size = spec.feed_forward.size
        templates |= stacked("blk.{i}.ffn_up", ("gate", "up"), (size, size))
    return map_tensors(spec, templates)
