"""The reference executor: a DecoderSpec in plain torch, written to be read and believed.

It is the oracle of the parity tests and the way to devices that the native core does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fuserve.architectures import (
    DecoderSpec,
    LayerSpec,
    NormSpec,
    alibi_slopes,
    rope_rotations,
    tensor_shapes,
)
from fuserve.checkpoints import to_float32
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, StepBatch
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import MissingExtraError

try:
    import torch
    from torch import Tensor
    from torch.nn import functional
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The reference executor") from error

from fuserve.decoder.reference_inputs import ReferenceInput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class ReferenceExecutor:
    """Runs steps of any spec over a paged KV cache, one plain operation after the other.

    Args:
        weights: dequantized as a whole when the executor is built.
        num_blocks: blocks of the KV cache.
        device: any torch device.
        dtype: a floating type, for weights, cache and arithmetic.
        max_model_len: the longest sequence that will be run, which some rotary scalings ask
            for; by default the spec's.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        num_blocks: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_model_len: int | None = None,
    ) -> None:
        spec = weights.spec
        self.spec: DecoderSpec = spec
        self.num_blocks = num_blocks
        self._max_model_len = max_model_len or spec.max_position
        self._device = torch.device(device)
        self._dtype = dtype
        self._weights, self._inputs = _load(weights, self._device, dtype)
        self._slopes = self._to_device(alibi_slopes(spec.attention.num_heads)).to(dtype)
        cache_shape = (
            spec.num_layers,
            num_blocks,
            BLOCK_SIZE_TOKENS,
            spec.attention.num_kv_heads,
            spec.attention.head_dim,
        )
        self._keys = torch.zeros(cache_shape, device=self._device, dtype=dtype)
        self._values = torch.zeros(cache_shape, device=self._device, dtype=dtype)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        """Run every layer over the batch; return logits  # [rows, vocab], set ``batch.hidden``."""
        spec = self.spec
        hidden = self._embed(batch)  # [tokens, hidden]
        for index, layer in enumerate(spec.layers):
            hidden = self._layer(index, layer, hidden, batch)
        batch.hidden = (
            self._last_norm(hidden[self._to_device(batch.hidden_rows)]).float().cpu().numpy()
        )
        hidden = self._last_norm(hidden[self._to_device(batch.logit_rows)])  # [rows, hidden]
        head = "embedding" if spec.tied_head else "head"
        logits = functional.linear(hidden, self._weights[head], self._weights.get("head.bias"))
        logits = _softcap(logits, spec.logit_softcap)
        return logits.float().cpu().numpy()

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all layers."""
        for source, target in pairs:
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]

    def _last_norm(self, hidden: Tensor) -> Tensor:
        return self._norm("final_norm", self.spec.norm, hidden) if self.spec.final_norm else hidden

    def _embed(self, batch: StepBatch) -> Tensor:
        spec = self.spec
        hidden = self._weights["embedding"][self._to_device(batch.tokens)] * spec.embedding_scale
        if spec.learned_position_offset is not None:
            rows = self._to_device(batch.positions) + spec.learned_position_offset
            hidden = hidden + self._weights["position_embedding"][rows]
        if spec.embedding_norm:
            hidden = self._norm("embedding_norm", spec.norm, hidden)
        return hidden

    def _layer(self, index: int, layer: LayerSpec, hidden: Tensor, batch: StepBatch) -> Tensor:
        prefix = f"layers.{index}."

        def norm(name: str, x: Tensor) -> Tensor:
            return self._norm(prefix + name, self.spec.norm, x)

        def attention(x: Tensor) -> Tensor:
            return self._attention(index, layer, x, batch)

        def feed_forward(x: Tensor) -> Tensor:
            return self._feed_forward(prefix, x)

        halves = (
            (attention, "attn_norm", "post_attn_norm"),
            (feed_forward, "ffn_norm", "post_ffn_norm"),
        )
        for half, norm_name, post_norm_name in halves:
            if self.spec.residual == "post":
                hidden = norm(norm_name, hidden + half(hidden))
            elif self.spec.residual == "sandwich":
                hidden = hidden + norm(post_norm_name, half(norm(norm_name, hidden)))
            else:
                hidden = hidden + half(norm(norm_name, hidden))
        return hidden

    def _feed_forward(self, prefix: str, hidden: Tensor) -> Tensor:
        spec = self.spec.feed_forward
        activation = ACTIVATIONS[spec.activation]
        up = self._linear(prefix + "up", hidden)  # [tokens, size]
        if spec.gated:
            up = activation(self._linear(prefix + "gate", hidden)) * up
        else:
            up = activation(up)
        return self._linear(prefix + "down", up)

    def _attention(self, index: int, layer: LayerSpec, hidden: Tensor, batch: StepBatch) -> Tensor:
        prefix, spec = f"layers.{index}.", self.spec.attention
        query = self._linear(prefix + "q", hidden).view(-1, spec.num_heads, spec.head_dim)
        key = self._linear(prefix + "k", hidden).view(-1, spec.num_kv_heads, spec.head_dim)
        value = self._linear(prefix + "v", hidden).view(-1, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm is not None:
            query = self._norm(prefix + "q_norm", spec.qk_norm, query)
            key = self._norm(prefix + "k_norm", spec.qk_norm, key)
        if layer.rope is not None:
            angles = rope_rotations(layer.rope, batch.positions, self._max_model_len)
            cos, sin = (self._to_device(part)[:, None] for part in angles)  # [tokens, 1, dim / 2]
            query = _rotate(query, cos, sin, layer.rope.interleaved)
            key = _rotate(key, cos, sin, layer.rope.interleaved)

        context = torch.empty_like(query)  # [tokens, heads, head_dim]
        for sequence, table in enumerate(batch.block_tables):
            start, stop = batch.query_starts[sequence : sequence + 2].tolist()
            if start == stop:
                continue
            positions = self._to_device(batch.positions[start:stop])
            blocks = self._to_device(table)
            block, slot = blocks[positions // BLOCK_SIZE_TOKENS], positions % BLOCK_SIZE_TOKENS
            self._keys[index, block, slot] = key[start:stop]
            self._values[index, block, slot] = value[start:stop]
            length = int(batch.positions[stop - 1]) + 1
            blocks = blocks[: -(-length // BLOCK_SIZE_TOKENS)]
            keys = self._keys[index, blocks].flatten(0, 1)[:length]  # [length, kv_heads, head_dim]
            values = self._values[index, blocks].flatten(0, 1)[:length]
            context[start:stop] = self._attend(query[start:stop], keys, values, positions, layer)
        return self._linear(prefix + "o", context.flatten(1))

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, layer: LayerSpec
    ) -> Tensor:
        """One sequence's attention over all its keys so far  # [queries, heads, head_dim]."""
        spec = self.spec.attention
        group = spec.num_heads // spec.num_kv_heads
        keys = keys.repeat_interleave(group, dim=1)  # [length, heads, head_dim]
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) * spec.scale
        scores = _softcap(scores, spec.score_softcap)
        key_positions = torch.arange(len(keys), device=self._device)
        distance = positions[:, None] - key_positions  # [queries, length]
        if spec.alibi:
            scores = scores - self._slopes[:, None, None] * distance
        is_hidden = distance < 0
        if layer.sliding_window is not None:
            is_hidden = is_hidden | (distance >= layer.sliding_window)
        scores = scores.masked_fill(is_hidden, float("-inf"))
        weights = torch.softmax(scores.float(), dim=-1).to(self._dtype)
        return torch.einsum("hqk,khd->qhd", weights, values)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        given = self._inputs.get(name)
        if given is None:
            return functional.linear(x, self._weights[name], self._weights.get(name + ".bias"))
        y = functional.linear(
            given.prepare(x), self._weights[name], self._weights.get(name + ".bias")
        )
        return given.add_shift(y)

    def _norm(self, name: str, norm: NormSpec, x: Tensor) -> Tensor:
        """Normalize the last dimension, in float32 whatever the dtype."""
        wide = x.float()
        if norm.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        wide = wide * self._weights[name]
        if norm.bias:
            wide = wide + self._weights[name + ".bias"]
        return wide.to(self._dtype)

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if not tensor.is_floating_point():
            tensor = tensor.long()
        return tensor.to(self._device)


def _load(
    weights: DecoderWeights, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, ReferenceInput]]:
    """All tensors, and what quantized linears do beside their product."""
    loaded, inputs = {}, {}
    for name in tensor_shapes(weights.spec):
        tensor = weights.tensor(name)
        values = np.array(to_float32(tensor))  # a copy that torch may own
        loaded[name] = torch.from_numpy(values).to(device=device, dtype=dtype)
        if tensor.quantized is not None:
            inputs[name] = ReferenceInput(tensor.quantized)
        weights.release(name)
    return loaded, inputs


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the leading features of ``x``  # [tokens, heads, head_dim], in float32."""
    half = cos.shape[-1]
    turned, passed = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)
