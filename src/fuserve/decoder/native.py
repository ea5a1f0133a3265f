"""The native executor: a model's packed weights, its paged cache, and one native call a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import KVCache, Norm, PackedLinear, ThreadPool
from fuserve.architectures import (
    DecoderSpec,
    LayerSpec,
    RopeSpec,
    alibi_slopes,
    rope_frequencies,
)
from fuserve.decoder.communicator import Communicator, check_communicator
from fuserve.decoder.model_part import ModelPart
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.packed_reader import NativeRowSplit, PackedReader
from fuserve.decoder.packing import Progress, packed_memory
from fuserve.decoder.shard import WHOLE_MODEL, Shard
from fuserve.decoder.step import StepBatch
from fuserve.decoder.storage_plan import PlannedTensor, plan_storage
from fuserve.decoder.weights import DecoderWeights
from fuserve.kernels.cache import CacheType
from fuserve.kernels.linear import WeightFormat
from fuserve.kernels.machine import num_threads, selected_isa

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
RESIDUALS = {"pre": 0, "post": 1, "sandwich": 2}
CACHE_TYPES = {
    "float32": CacheType.F32,
    "float16": CacheType.F16,
    "int8": CacheType.I8,
    "int4": CacheType.I4,
}


@dataclass(frozen=True, slots=True)
class NativeRope:
    """Rotary frequencies as the native core reads them; dynamic_factor 0 is a fixed base."""

    dim: int
    interleaved: bool
    attention_factor: float
    inverse_frequencies: list[float]
    dynamic_factor: float
    dynamic_base: float
    dynamic_from: int


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's weights as the native core reads them."""

    attn_norm: Norm
    ffn_norm: Norm
    post_attn_norm: Norm | None
    post_ffn_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    q: PackedLinear
    k: PackedLinear
    v: PackedLinear
    o: NativeRowSplit
    gate: PackedLinear | None
    up: PackedLinear
    down: NativeRowSplit
    rope: int
    window: int


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A model, or a rank's and a stage's part of it, as the native core reads it.

    0 stands for "no soft-cap". ``vocab_sizes`` are all ranks' shares of the vocabulary; this rank's
    begins with token ``first_token``.
    """

    hidden_size: int
    vocab_size: int
    vocab_sizes: list[int]
    first_token: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_scale: float
    score_softcap: float
    alibi_slopes: list[float]
    gated: bool
    activation: int
    residual: int
    embedding_scale: float
    logit_softcap: float
    position_embedding: npt.NDArray[np.float32] | None
    embedding_norm: Norm | None
    final_norm: Norm | None
    embedding: PackedLinear | None
    head: PackedLinear | None
    ropes: list[NativeRope]
    layers: list[NativeLayer]


class NativeExecutor:
    """Runs whole steps of a model, or of a part of one, in the native core.

    Args:
        weights: the model's tensors; read once, one by one.
        options: formats, threads and cache type.
        num_blocks: KV-cache blocks of 32 tokens.
        max_model_len: the longest sequence, which decides between LongRoPE's two sets.
        cache_file: where the packed weights are kept, if anywhere.
        progress: called with what is done, how many of how many.
        shard: the part of the model that this executor holds.
        communicator: to the ranks that share its layers; needed where there are any.

    Raises:
        InvalidRequestError: the options contradict each other, or the shard does not fit the model.
        CheckpointError: a tensor cannot be read.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        options: ExecutorOptions,
        *,
        num_blocks: int,
        max_model_len: int,
        cache_file: Path | None = None,
        progress: Progress | None = None,
        shard: Shard = WHOLE_MODEL,
        communicator: Communicator | None = None,
    ) -> None:
        check_communicator(shard, communicator)
        self.spec = weights.spec
        self.shard = shard
        self._part = part = ModelPart(weights.spec, shard, options.rank_invariant)
        self.num_blocks = num_blocks
        self.isa = selected_isa()
        self.num_threads = num_threads(options.num_threads)
        plan, self.formats = plan_storage(weights, options, part)
        pool = ThreadPool(self.num_threads)
        memory, self.from_cache = packed_memory(weights, plan, pool, cache_file, progress)
        self.packed_bytes = memory.nbytes
        reader = PackedReader(memory, plan, part)
        attention = part.spec.attention
        self._cache = KVCache(
            part.spec.num_layers,
            num_blocks,
            attention.num_kv_heads,
            attention.head_dim,
            int(cache_type(options, plan)),
        )
        self.kv_cache_bytes = int(self._cache.bytes)
        model = _native_model(reader, part, max_model_len)
        self.bytes_read_per_token = reader.bytes_read_per_token()
        self._pool = pool
        self._decoder = _native.Decoder(self.isa, model, self._cache, _native_end(communicator))

    def step(
        self, batch: StepBatch, hidden: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Run every layer over the batch; return logits, fill in hidden states.  # [rows, vocab]

        A stage that is not the first begins with ``hidden``, what the stage before it returned, and
        one that is not the last returns the hidden states of all tokens.  # [tokens, hidden]
        Of the ranks that share layers rank 0 returns all logits, the others none.  # [0, vocab]

        Raises:
            ValueError: the batch is inconsistent.
            ExchangeError: another rank did not take part; the executor cannot go on.
        """
        size, part = self.spec.hidden_size, self._part
        if (hidden is None) != part.is_first_stage:
            raise ValueError("hidden states are the input of all stages but the first")
        is_last = part.is_last_stage
        passed = np.empty((0 if is_last else len(batch.tokens), size), np.float32)
        num_rows = len(batch.logit_rows) if is_last and self.shard.tensor_rank == 0 else 0
        logits = np.empty((num_rows, self.spec.vocab_size), np.float32)
        num_hidden = len(batch.hidden_rows) if is_last else 0
        batch.hidden = np.empty((num_hidden, size), np.float32)
        self._decoder.step(
            self._pool,
            batch.tokens,
            batch.positions,
            batch.query_starts,
            batch.block_tables,
            batch.logit_rows,
            logits,
            batch.hidden_rows,
            batch.hidden,
            hidden,
            passed,
        )
        return logits if is_last else passed

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all layers.

        Raises:
            ValueError: there is no such block.
        """
        for source, target in pairs:
            self._cache.copy_block(source, target)

    def close(self) -> None:
        """Stop the threads and let go of weights and cache."""
        del self._decoder, self._cache, self._pool


def cache_type(options: ExecutorOptions, plan: dict[str, PlannedTensor]) -> CacheType:
    """The KV cache's type: as asked, or float16 unless all weights are float32."""
    if options.kv_cache_dtype != "auto":
        return CACHE_TYPES[options.kv_cache_dtype]
    storages = [tensor.storage for tensor in plan.values() if tensor.storage is not None]
    has_rounded = any(storage.format != WeightFormat.F32 for storage in storages)
    return CacheType.F16 if has_rounded else CacheType.F32


def kv_block_bytes(spec: DecoderSpec, kind: CacheType) -> int:
    """Bytes of one KV-cache block in all layers of a model, or of a ``ModelPart``'s ``spec``."""
    return kind.block_bytes(spec.num_layers, spec.attention.num_kv_heads, spec.attention.head_dim)


def _native_end(communicator: Communicator | None) -> object:
    """What the native core exchanges through: shared memory, or calls of the communicator."""
    if communicator is None or communicator.size == 1:
        return None
    return communicator if communicator.shared is None else communicator.shared.native


def _native_model(reader: PackedReader, part: ModelPart, max_model_len: int) -> NativeModel:
    spec = part.spec
    ropes: list[RopeSpec] = []
    for layer in spec.layers:
        if layer.rope is not None and layer.rope not in ropes:
            ropes.append(layer.rope)
    positions = reader.optional_array("position_embedding")
    if positions is not None:
        positions = positions[spec.learned_position_offset or 0 :]
    attention = spec.attention
    embedding_table = "embedding" if spec.tied_head else "head"
    slopes = alibi_slopes(part.whole.attention.num_heads)[part.heads.start : part.heads.stop]
    return NativeModel(
        hidden_size=spec.hidden_size,
        vocab_size=part.whole.vocab_size,
        vocab_sizes=[len(vocabulary) for vocabulary in part.slices.vocabulary],
        first_token=part.vocabulary.start,
        ffn_size=spec.feed_forward.size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        attention_scale=attention.scale,
        score_softcap=attention.score_softcap or 0.0,
        alibi_slopes=slopes.tolist() if attention.alibi else [],
        gated=spec.feed_forward.gated,
        activation=ACTIVATIONS[spec.feed_forward.activation],
        residual=RESIDUALS[spec.residual],
        embedding_scale=spec.embedding_scale,
        logit_softcap=spec.logit_softcap or 0.0,
        position_embedding=positions,
        embedding_norm=reader.optional_norm("embedding_norm", spec.norm),
        final_norm=reader.optional_norm("final_norm", spec.norm),
        embedding=reader.linear("embedding") if part.is_first_stage else None,
        head=reader.linear(embedding_table, "head.bias") if part.is_last_stage else None,
        ropes=[_native_rope(rope, max_model_len) for rope in ropes],
        layers=[_native_layer(reader, part.whole, i, ropes) for i in part.layers],
    )


def _native_rope(rope: RopeSpec, max_model_len: int) -> NativeRope:
    table = rope_frequencies(rope, max_model_len)
    scaling = rope.scaling
    is_dynamic = scaling is not None and scaling.kind == "dynamic"
    return NativeRope(
        dim=rope.dim,
        interleaved=rope.interleaved,
        attention_factor=table.attention_factor,
        inverse_frequencies=table.inv_freq.tolist(),
        dynamic_factor=scaling.factor if is_dynamic and scaling else 0.0,
        dynamic_base=rope.base,
        dynamic_from=scaling.original_max_position if is_dynamic and scaling else 0,
    )


def _native_layer(
    reader: PackedReader, spec: DecoderSpec, index: int, ropes: list[RopeSpec]
) -> NativeLayer:
    layer: LayerSpec = spec.layers[index]
    prefix = f"layers.{index}."
    qk_norm = spec.attention.qk_norm
    return NativeLayer(
        attn_norm=reader.norm(prefix + "attn_norm", spec.norm),
        ffn_norm=reader.norm(prefix + "ffn_norm", spec.norm),
        post_attn_norm=reader.optional_norm(prefix + "post_attn_norm", spec.norm),
        post_ffn_norm=reader.optional_norm(prefix + "post_ffn_norm", spec.norm),
        q_norm=reader.optional_norm(prefix + "q_norm", qk_norm),
        k_norm=reader.optional_norm(prefix + "k_norm", qk_norm),
        q=reader.linear(prefix + "q"),
        k=reader.linear(prefix + "k"),
        v=reader.linear(prefix + "v"),
        o=reader.row_split(prefix + "o"),
        gate=reader.optional_linear(prefix + "gate"),
        up=reader.linear(prefix + "up"),
        down=reader.row_split(prefix + "down"),
        rope=ropes.index(layer.rope) if layer.rope is not None else -1,
        window=layer.sliding_window or 0,
    )
