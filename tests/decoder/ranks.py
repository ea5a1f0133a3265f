"""Several ranks and stages of one model in one process: each an executor on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fuserve.decoder.communicator import tree_sum
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import Shard
from fuserve.decoder.step import StepBatch
from fuserve.decoder.weights import DecoderWeights
from fuserve.kernels.exchange import SharedExchange, segment_bytes

EXCHANGE_FLOATS = 1024
"""Few, so that prompts and rows of logits go in several exchanges."""


def shared_memory(size: int, floats: int) -> np.ndarray:
    memory = np.zeros(segment_bytes(size, floats) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + segment_bytes(size, floats)]


class SharedCommunicator:
    """Ranks of one host: everything happens in ``shared``."""

    def __init__(
        self, memory: np.ndarray, rank: int, size: int, floats: int, timeout_s: float = 60.0
    ) -> None:
        self.rank = rank
        self.size = size
        self.shared: SharedExchange | None = SharedExchange(
            memory, rank=rank, size=size, floats=floats, timeout_s=timeout_s
        )

    def all_reduce(self, array: np.ndarray) -> None:
        raise AssertionError("ranks that share memory need no calls")

    def gather(self, parts: Sequence[np.ndarray]) -> None:
        raise AssertionError("ranks that share memory need no calls")


class BarrierCommunicator:
    """Ranks that share no memory, as on several hosts; here they meet in a table."""

    shared = None

    def __init__(self, table: dict[int, Any], barrier: threading.Barrier, rank: int) -> None:
        self.rank = rank
        self.size = barrier.parties
        self._table, self._barrier = table, barrier

    def all_reduce(self, array: np.ndarray) -> None:
        array[...] = tree_sum(self._all(array.copy()))
        self._barrier.wait(60)

    def gather(self, parts: Sequence[np.ndarray]) -> None:
        for mine, received in zip(parts, self._all(parts[self.rank]), strict=True):
            if self.rank == 0:
                mine[...] = received
        self._barrier.wait(60)

    def _all(self, mine: np.ndarray) -> list[np.ndarray]:
        self._table[self.rank] = mine
        self._barrier.wait(60)
        return [self._table[rank] for rank in range(self.size)]


class RankedExecutor:
    """A model in ``tensor_size`` ranks and stages that begin at ``stage_starts``."""

    def __init__(
        self,
        weights: DecoderWeights,
        options: ExecutorOptions,
        tensor_size: int,
        *,
        num_blocks: int,
        max_model_len: int,
        stage_starts: Sequence[int] = (0,),
        shares_memory: bool = True,
        **given: Any,
    ) -> None:
        self.spec = weights.spec
        self.num_blocks = num_blocks
        self._pool = ThreadPoolExecutor(tensor_size)
        self.stages: list[list[NativeExecutor]] = []
        for first, end in zip(stage_starts, [*stage_starts[1:], None], strict=True):
            ends = communicators(tensor_size, weights.spec, shares_memory)
            self.stages.append(
                [
                    NativeExecutor(
                        weights,
                        options,
                        num_blocks=num_blocks,
                        max_model_len=max_model_len,
                        shard=Shard(rank, tensor_size, first, end),
                        communicator=ends[rank],
                        **given,
                    )
                    for rank in range(tensor_size)
                ]
            )

    def step(self, batch: StepBatch) -> np.ndarray:
        hidden = None
        for stage in self.stages:
            batches = [
                StepBatch(
                    batch.tokens,
                    batch.positions,
                    batch.query_starts,
                    batch.block_tables,
                    batch.logit_rows,
                    batch.hidden_rows,
                )
                for _ in stage
            ]
            runs = [
                self._pool.submit(executor.step, mine, hidden)
                for executor, mine in zip(stage, batches, strict=True)
            ]
            outputs = [run.result() for run in runs]
            hidden = outputs[0]
        batch.hidden = batches[0].hidden
        assert all(len(other) == 0 for other in outputs[1:])
        return outputs[0]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        for stage in self.stages:
            for executor in stage:
                executor.copy_blocks(pairs)


def communicators(size: int, spec: Any, shares_memory: bool) -> list[Any]:
    if size == 1:
        return [None]
    if not shares_memory:
        table: dict[int, Any] = {}
        barrier = threading.Barrier(size)
        return [BarrierCommunicator(table, barrier, rank) for rank in range(size)]
    floats = max(EXCHANGE_FLOATS, spec.vocab_size)
    memory = shared_memory(size, floats)
    return [SharedCommunicator(memory, rank, size, floats) for rank in range(size)]
