"""A decoder's layers in plain numpy, one at a time, showing what their linear layers read.

Calibration runs whole sequences from their beginning, so there is no cache and nothing to page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fuserve.architectures import (
    DecoderSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
    alibi_slopes,
    rope_rotations,
)

Floats = npt.NDArray[np.float32]
Weights = Mapping[str, Floats]
"""Tensors of one layer by canonical name, without ``layers.{i}.``."""

Observe = Callable[[str, Floats], None]
"""Called with a place ("attn", "o", "ffn", "down") and what its linear layers read."""


class LayerForward:
    """Runs single layers of a spec over sequences that begin at position 0.

    Args:
        spec: the decoder.
        num_tokens: of every sequence.
    """

    def __init__(self, spec: DecoderSpec, num_tokens: int) -> None:
        self._spec = spec
        self._positions = np.arange(num_tokens)
        self._slopes = np.asarray(alibi_slopes(spec.attention.num_heads), np.float32)
        self._rotations: dict[RopeSpec, tuple[Floats, Floats]] = {}

    def embed(self, tokens: npt.NDArray[np.integer], tensors: Weights) -> Floats:
        """What the first layer reads.

        Args:
            tokens: ``[sequences, tokens]``.
            tensors: ``embedding``, and ``position_embedding`` and ``embedding_norm`` if there.
        """
        spec = self._spec
        hidden = tensors["embedding"][tokens] * np.float32(spec.embedding_scale)
        if spec.learned_position_offset is not None:
            rows = self._positions[: tokens.shape[1]] + spec.learned_position_offset
            hidden = hidden + tensors["position_embedding"][rows]
        if spec.embedding_norm:
            hidden = normalize("embedding_norm", spec.norm, tensors, hidden)
        return np.ascontiguousarray(hidden, np.float32)

    def layer(
        self, layer: LayerSpec, weights: Weights, hidden: Floats, observe: Observe | None = None
    ) -> Floats:
        """One layer's output for its input.  # [sequences, tokens, hidden]"""
        see = observe or (lambda _place, _rows: None)

        def attention(x: Floats) -> Floats:
            see("attn", x)
            context = self._attention(layer, weights, x)
            see("o", context)
            return linear("o", weights, context)

        def feed_forward(x: Floats) -> Floats:
            see("ffn", x)
            inner = self._inner(weights, x)
            see("down", inner)
            return linear("down", weights, inner)

        halves = (
            (attention, "attn_norm", "post_attn_norm"),
            (feed_forward, "ffn_norm", "post_ffn_norm"),
        )
        for half, name, post_name in halves:
            if self._spec.residual == "post":
                hidden = self._norm(name, weights, hidden + half(hidden))
            elif self._spec.residual == "sandwich":
                inside = half(self._norm(name, weights, hidden))
                hidden = hidden + self._norm(post_name, weights, inside)
            else:
                hidden = hidden + half(self._norm(name, weights, hidden))
        return hidden

    def last(self, tensors: Weights, hidden: Floats) -> Floats:
        """What the head reads.  # [sequences, tokens, hidden]"""
        return self._norm("final_norm", tensors, hidden) if self._spec.final_norm else hidden

    def _norm(self, name: str, weights: Weights, x: Floats) -> Floats:
        return normalize(name, self._spec.norm, weights, x)

    def _inner(self, weights: Weights, x: Floats) -> Floats:
        spec = self._spec.feed_forward
        activation = ACTIVATIONS[spec.activation]
        up = linear("up", weights, x)
        return activation(linear("gate", weights, x)) * up if spec.gated else activation(up)

    def _attention(self, layer: LayerSpec, weights: Weights, x: Floats) -> Floats:
        spec = self._spec.attention
        query = self._heads("q", spec.num_heads, layer, weights, x)
        key = self._heads("k", spec.num_kv_heads, layer, weights, x)
        value = self._heads("v", spec.num_kv_heads, layer, weights, x)
        context = np.empty((*x.shape[:2], spec.num_heads * spec.head_dim), np.float32)
        hidden_keys = self._hidden_keys(layer, x.shape[1])
        for sequence in range(len(x)):
            scores = self._scores(query[sequence], key[sequence], hidden_keys)
            mixed = scores @ value[sequence][:, None]  # [kv_heads, group, tokens, head_dim]
            context[sequence] = mixed.transpose(2, 0, 1, 3).reshape(x.shape[1], -1)
        return context

    def _heads(
        self, name: str, num_heads: int, layer: LayerSpec, weights: Weights, x: Floats
    ) -> Floats:
        """Normalized and rotated heads  # [sequences, heads, tokens, head_dim]"""
        spec = self._spec.attention
        heads = linear(name, weights, x).reshape(*x.shape[:2], num_heads, spec.head_dim)
        if name == "v":
            return heads.transpose(0, 2, 1, 3)
        if spec.qk_norm is not None:
            heads = normalize(f"{name}_norm", spec.qk_norm, weights, heads)
        if layer.rope is not None:
            if layer.rope not in self._rotations:
                longest = self._spec.max_position
                self._rotations[layer.rope] = rope_rotations(layer.rope, self._positions, longest)
            cos, sin = (part[: x.shape[1], None] for part in self._rotations[layer.rope])
            heads = rotate(heads, cos, sin, layer.rope.interleaved)
        return heads.transpose(0, 2, 1, 3)

    def _scores(self, query: Floats, key: Floats, hidden_keys: npt.NDArray[np.bool_]) -> Floats:
        """Attention weights of one sequence  # [kv_heads, group, tokens, tokens]"""
        spec = self._spec.attention
        num_kv_heads, num_tokens, head_dim = key.shape
        grouped = query.reshape(num_kv_heads, -1, num_tokens, head_dim)
        scores: Floats = np.matmul(grouped, key[:, None].swapaxes(-1, -2))
        scores *= np.float32(spec.scale)
        if spec.score_softcap is not None:
            scores /= np.float32(spec.score_softcap)
            np.tanh(scores, out=scores)
            scores *= np.float32(spec.score_softcap)
        if spec.alibi:
            distance = self._positions[:num_tokens, None] - self._positions[:num_tokens]
            slopes = self._slopes.reshape(num_kv_heads, -1, 1, 1)
            scores -= slopes * distance.astype(np.float32)
        scores[..., hidden_keys] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores

    def _hidden_keys(self, layer: LayerSpec, num_tokens: int) -> npt.NDArray[np.bool_]:
        positions = self._positions[:num_tokens]
        distance = positions[:, None] - positions
        hidden = distance < 0
        if layer.sliding_window is not None:
            hidden |= distance >= layer.sliding_window
        return hidden


def linear(name: str, weights: Weights, x: Floats) -> Floats:
    """``x @ W.T + bias`` of layer ``name``."""
    rows = x.reshape(-1, x.shape[-1]) @ weights[name].T
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        rows += bias
    return rows.reshape(*x.shape[:-1], -1)


def normalize(name: str, norm: NormSpec, weights: Weights, x: Floats) -> Floats:
    """RMSNorm or LayerNorm of the last dimension."""
    if norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    x = x / np.sqrt(mean_square + np.float32(norm.eps)) * weights[name]
    bias = weights.get(f"{name}.bias")
    return x if bias is None else x + bias


def rotate(x: Floats, cos: Floats, sin: Floats, interleaved: bool) -> Floats:
    """Rotate the leading features of each head  # [..., tokens, heads, head_dim]"""
    half = cos.shape[-1]
    turned, passed = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    if interleaved:
        turned = np.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = np.concatenate(pair, axis=-1)
    return np.concatenate((turned, passed), axis=-1)


def _gelu(x: Floats) -> Floats:
    """Exact GELU; the error function is Abramowitz and Stegun's 7.1.26, within 1.5e-7."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    result: Floats = np.float32(0.5) * x * (1 + erf)
    return result


def _gelu_tanh(x: Floats) -> Floats:
    cubic = x + np.float32(0.044715) * x * x * x
    result: Floats = np.float32(0.5) * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * cubic))
    return result


def _silu(x: Floats) -> Floats:
    # Through tanh, which cannot overflow.
    result: Floats = x * (np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x)))
    return result


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
