"""The canonical tensors of a DecoderSpec: what every decoder is made of, whatever its source."""

from __future__ import annotations

import math

from fuserve.architectures.spec import DecoderSpec, NormSpec

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(spec: DecoderSpec) -> Shapes:
    """Canonical name -> shape; linear weights are ``[out_features, in_features]``."""
    hidden = spec.hidden_size
    shapes: Shapes = {"embedding": (spec.vocab_size, hidden)}
    if spec.learned_position_offset is not None:
        num_rows = spec.max_position + spec.learned_position_offset
        shapes["position_embedding"] = (num_rows, hidden)
    if spec.embedding_norm:
        _add_norm(shapes, "embedding_norm", spec.norm, hidden)
    for layer in range(spec.num_layers):
        _add_layer(shapes, f"layers.{layer}.", spec)
    if spec.final_norm:
        _add_norm(shapes, "final_norm", spec.norm, hidden)
    if not spec.tied_head:
        shapes["head"] = (spec.vocab_size, hidden)
    if spec.head_bias:
        shapes["head.bias"] = (spec.vocab_size,)
    return shapes


def num_parameters(spec: DecoderSpec) -> int:
    """Parameters of a decoder, tied ones counted once."""
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())


def _add_layer(shapes: Shapes, prefix: str, spec: DecoderSpec) -> None:
    hidden, attention, feed_forward = spec.hidden_size, spec.attention, spec.feed_forward
    query = attention.num_heads * attention.head_dim
    key = attention.num_kv_heads * attention.head_dim
    is_sandwich = spec.residual == "sandwich"

    _add_norm(shapes, prefix + "attn_norm", spec.norm, hidden)
    _add_linear(shapes, prefix + "q", query, hidden, attention.qkv_bias)
    _add_linear(shapes, prefix + "k", key, hidden, attention.qkv_bias)
    _add_linear(shapes, prefix + "v", key, hidden, attention.qkv_bias)
    if attention.qk_norm is not None:
        _add_norm(shapes, prefix + "q_norm", attention.qk_norm, attention.head_dim)
        _add_norm(shapes, prefix + "k_norm", attention.qk_norm, attention.head_dim)
    _add_linear(shapes, prefix + "o", hidden, query, attention.output_bias)
    if is_sandwich:
        _add_norm(shapes, prefix + "post_attn_norm", spec.norm, hidden)

    _add_norm(shapes, prefix + "ffn_norm", spec.norm, hidden)
    if feed_forward.gated:
        _add_linear(shapes, prefix + "gate", feed_forward.size, hidden, feed_forward.bias)
    _add_linear(shapes, prefix + "up", feed_forward.size, hidden, feed_forward.bias)
    _add_linear(shapes, prefix + "down", hidden, feed_forward.size, feed_forward.bias)
    if is_sandwich:
        _add_norm(shapes, prefix + "post_ffn_norm", spec.norm, hidden)


def _add_norm(shapes: Shapes, name: str, norm: NormSpec, size: int) -> None:
    shapes[name] = (size,)
    if norm.bias:
        shapes[name + ".bias"] = (size,)


def _add_linear(shapes: Shapes, name: str, out_size: int, in_size: int, bias: bool) -> None:
    shapes[name] = (out_size, in_size)
    if bias:
        shapes[name + ".bias"] = (out_size,)
