"""Drives an executor as an engine would: sequences over shuffled blocks, mixed into steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.reference import ReferenceExecutor
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor, StepBatch
from fuserve.decoder.weights import DecoderWeights

NUM_BLOCKS = 24


def build_executor(kind: str, weights: DecoderWeights, max_model_len: int) -> Executor:
    if kind == "reference":
        return ReferenceExecutor(weights, num_blocks=NUM_BLOCKS, max_model_len=max_model_len)
    options = ExecutorOptions(dtype="float32", kv_cache_dtype="float32", activations="float")
    return NativeExecutor(weights, options, num_blocks=NUM_BLOCKS, max_model_len=max_model_len)


class PagedSequences:
    """Sequences that take blocks in a shuffled order as they grow."""

    def __init__(self, executor: Executor, seed: int = 0) -> None:
        self.executor = executor
        order = np.random.default_rng(seed).permutation(executor.num_blocks)
        self._free = order.tolist()
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        self.hidden: dict[str, np.ndarray] = {}  # of the last step, as its logits

    def step(self, chunks: dict[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Run the next tokens of each sequence; logits of every one  # [tokens, vocab]."""
        positions = []
        for name, tokens in chunks.items():
            start = self._lengths.get(name, 0)
            stop = start + len(tokens)
            blocks = self._blocks.setdefault(name, [])
            while len(blocks) * BLOCK_SIZE_TOKENS < stop:
                blocks.append(self._free.pop())
            self._lengths[name] = stop
            positions.extend(range(start, stop))
        width = max(len(self._blocks[name]) for name in chunks)
        tables = np.full((len(chunks), width), -1, np.int32)
        for row, name in enumerate(chunks):
            tables[row, : len(self._blocks[name])] = self._blocks[name]
        starts = np.cumsum([0, *map(len, chunks.values())])
        batch = StepBatch(
            tokens=np.concatenate([np.asarray(t, np.int32) for t in chunks.values()]),
            positions=np.array(positions, np.int32),
            query_starts=starts.astype(np.int32),
            block_tables=tables,
            logit_rows=np.arange(len(positions), dtype=np.int32),
            hidden_rows=np.arange(len(positions), dtype=np.int32),
        )
        logits = self.executor.step(batch)
        self.hidden = dict(zip(chunks, np.split(batch.hidden, starts[1:-1]), strict=True))
        parts = np.split(logits, starts[1:-1])
        return dict(zip(chunks, parts, strict=True))
