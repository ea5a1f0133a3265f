"""The reference executor: a DecoderSpec in plain torch, written to be read and believed.

It is the oracle of the parity tests and the way to devices that the native core does not know. Like
the native one it runs the whole model, or a rank's and a stage's part of it.
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
)
from fuserve.checkpoints import to_float32
from fuserve.decoder.communicator import Communicator, check_communicator
from fuserve.decoder.model_part import ModelPart
from fuserve.decoder.shard import WHOLE_MODEL, Shard
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
        shard: the part of the model that this executor holds.
        communicator: to the ranks that share its layers; needed where there are any. It exchanges
            host memory, whatever the device.

    Raises:
        InvalidRequestError: the shard does not fit the model, or has no communicator.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        num_blocks: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_model_len: int | None = None,
        shard: Shard = WHOLE_MODEL,
        communicator: Communicator | None = None,
    ) -> None:
        check_communicator(shard, communicator)
        spec = weights.spec
        self.spec: DecoderSpec = spec
        self._part = part = ModelPart(spec, shard)
        self._rank = shard.tensor_rank
        self._communicator = communicator
        self.num_blocks = num_blocks
        self._max_model_len = max_model_len or spec.max_position
        self._device = torch.device(device)
        self._dtype = dtype
        self._weights, self._inputs = _load(weights, part, self._device, dtype)
        slopes = alibi_slopes(spec.attention.num_heads)[part.heads.start : part.heads.stop]
        self._slopes = self._to_device(slopes).to(dtype)
        cache_shape = (
            part.spec.num_layers,
            num_blocks,
            BLOCK_SIZE_TOKENS,
            part.spec.attention.num_kv_heads,
            part.spec.attention.head_dim,
        )
        self._keys = torch.zeros(cache_shape, device=self._device, dtype=dtype)
        self._values = torch.zeros(cache_shape, device=self._device, dtype=dtype)

    @torch.inference_mode()
    def step(
        self, batch: StepBatch, given: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Run every layer over the batch; return logits  # [rows, vocab], set ``batch.hidden``.

        A stage that is not the first begins with ``given``, what the stage before it returned, and
        one that is not the last returns the hidden states of all tokens.  # [tokens, hidden]
        Of the ranks that share layers rank 0 returns all logits, the others none.  # [0, vocab]
        """
        spec, part = self.spec, self._part
        if (given is None) != part.is_first_stage:
            raise ValueError("hidden states are the input of all stages but the first")
        # [tokens, hidden]
        hidden = self._embed(batch) if given is None else self._to_device(given).to(self._dtype)
        for place, index in enumerate(part.layers):
            hidden = self._layer(place, index, hidden, batch)
        if not part.is_last_stage:
            batch.hidden = np.empty((0, spec.hidden_size), np.float32)
            return hidden.float().cpu().numpy()
        batch.hidden = (
            self._last_norm(hidden[self._to_device(batch.hidden_rows)]).float().cpu().numpy()
        )
        hidden = self._last_norm(hidden[self._to_device(batch.logit_rows)])  # [rows, hidden]
        head = "embedding" if spec.tied_head else "head"
        logits = functional.linear(hidden, self._weights[head], self._weights.get("head.bias"))
        return self._all_logits(_softcap(logits, spec.logit_softcap).float().cpu().numpy())

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all layers."""
        for source, target in pairs:
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]

    def _last_norm(self, hidden: Tensor) -> Tensor:
        return self._norm("final_norm", self.spec.norm, hidden) if self.spec.final_norm else hidden

    def _embed(self, batch: StepBatch) -> Tensor:
        spec, mine = self.spec, self._part.vocabulary
        tokens = self._to_device(batch.tokens) - mine.start
        is_mine = (tokens >= 0) & (tokens < len(mine))
        rows = self._weights["embedding"][tokens.clamp(0, len(mine) - 1)]
        hidden = self._sum(rows * is_mine[:, None]) * spec.embedding_scale
        if spec.learned_position_offset is not None:
            places = self._to_device(batch.positions) + spec.learned_position_offset
            hidden = hidden + self._weights["position_embedding"][places]
        if spec.embedding_norm:
            hidden = self._norm("embedding_norm", spec.norm, hidden)
        return hidden

    def _sum(self, mine: Tensor) -> Tensor:
        """The sum of all ranks' parts, added in fp32."""
        if self._communicator is None:
            return mine
        array = np.ascontiguousarray(mine.float().cpu().numpy())
        self._communicator.all_reduce(array)
        return torch.from_numpy(array).to(device=self._device, dtype=self._dtype)

    def _all_logits(self, mine: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Every rank's share of the vocabulary side by side, in rank 0."""
        if self._communicator is None:
            return mine
        shares = self._part.slices.vocabulary
        parts = [np.empty((len(mine), len(share)), np.float32) for share in shares]
        parts[self._rank][...] = mine
        self._communicator.gather(parts)
        if self._rank == 0:
            return np.concatenate(parts, axis=1)
        return np.empty((0, self.spec.vocab_size), np.float32)

    def _layer(self, place: int, index: int, hidden: Tensor, batch: StepBatch) -> Tensor:
        """Layer ``index`` of the model, which is at ``place`` in the part and in its cache."""
        prefix, layer = f"layers.{index}.", self.spec.layers[index]

        def norm(name: str, x: Tensor) -> Tensor:
            return self._norm(prefix + name, self.spec.norm, x)

        def attention(x: Tensor) -> Tensor:
            return self._attention(place, prefix, layer, x, batch)

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
        return self._summed_linear(prefix + "down", up)

    def _attention(
        self, place: int, prefix: str, layer: LayerSpec, hidden: Tensor, batch: StepBatch
    ) -> Tensor:
        spec = self._part.spec.attention
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
            self._keys[place, block, slot] = key[start:stop]
            self._values[place, block, slot] = value[start:stop]
            length = int(batch.positions[stop - 1]) + 1
            blocks = blocks[: -(-length // BLOCK_SIZE_TOKENS)]
            keys = self._keys[place, blocks].flatten(0, 1)[:length]  # [length, kv_heads, head_dim]
            values = self._values[place, blocks].flatten(0, 1)[:length]
            context[start:stop] = self._attend(query[start:stop], keys, values, positions, layer)
        return self._summed_linear(prefix + "o", context.flatten(1))

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, layer: LayerSpec
    ) -> Tensor:
        """One sequence's attention over all its keys so far  # [queries, heads, head_dim]."""
        spec = self._part.spec.attention
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
        return self._finished(name, self._product(name, x))

    def _summed_linear(self, name: str, x: Tensor) -> Tensor:
        """A linear of which each rank has some input features."""
        return self._finished(name, self._sum(self._product(name, x)))

    def _product(self, name: str, x: Tensor) -> Tensor:
        given = self._inputs.get(name)
        return functional.linear(x if given is None else given.prepare(x), self._weights[name])

    def _finished(self, name: str, y: Tensor) -> Tensor:
        """The product with what is added to it once, whatever the number of ranks."""
        bias, given = self._weights.get(name + ".bias"), self._inputs.get(name)
        if bias is not None:
            y = y + bias
        return y if given is None else given.add_shift(y)

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
    weights: DecoderWeights, part: ModelPart, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, ReferenceInput]]:
    """All tensors of the part, and what quantized linears do beside their product."""
    loaded, inputs = {}, {}
    for piece in part.tensors():
        tensor = weights.tensor(piece.source, piece.rows, piece.cols)
        values = np.array(to_float32(tensor))  # a copy that torch may own
        loaded[piece.name] = torch.from_numpy(values).to(device=device, dtype=dtype)
        if tensor.quantized is not None:
            inputs[piece.name] = ReferenceInput(tensor.quantized)
        weights.release(piece.source)
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
