"""What does it cost to run a model in ranks, and what does it save?

- a sum among two ranks through shared memory, beside gloo's (extra torch);
- two tensor-parallel ranks with one thread each beside one rank with two threads: prefill, decode,
  peak memory;
- two stages of the layers: peak memory of each.

Weights are made up, and every rank is a process of its own. The runs of one round follow each
other, and medians over the rounds are printed.

    python benchmarks/parallel.py --repeat 5
    python benchmarks/parallel.py --only sums
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fuserve.decoder.load import part_bytes
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import WHOLE_MODEL, Shard
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, StepBatch
from fuserve.decoder.weights import DummyWeights, spec_from_config
from fuserve.kernels.exchange import SharedExchange, segment_bytes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
EXCHANGE_FLOATS = 1 << 18
TIMEOUT_S = 60.0
SUM_SHAPE = (16, 2048)
SUM_ROUNDS = 2000


@dataclass(frozen=True)
class Ranks:
    """One way to hold the model: a process for each shard, with so many threads each.

    ``share_layers`` is False for stages, which are only loaded.
    """

    label: str
    shards: tuple[Shard, ...]
    threads: int

    @property
    def share_layers(self) -> bool:
        """Whether the processes run each step together."""
        return len(self.shards) == 1 or self.shards[0].tensor_size == len(self.shards)


@dataclass(frozen=True)
class Communicator:
    """See ``fuserve.decoder.communicator``; ranks of one host only exchange through ``shared``."""

    rank: int
    size: int
    shared: SharedExchange

    def all_reduce(self, array: Any) -> None:
        """Not called."""
        raise NotImplementedError

    def gather(self, parts: Any) -> None:
        """Not called."""
        raise NotImplementedError


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    result: dict[str, Any] = {"cores": sorted(os.sched_getaffinity(0))}
    if given.only in (None, "sums"):
        result["sums_us"] = sums = {
            "shared memory": in_pair(shared_sums),
            "gloo": in_pair(gloo_sums),
        }
        for name, micros in sums.items():
            print(
                f"sum of {SUM_SHAPE[0]} x {SUM_SHAPE[1]} floats, 2 ranks, {name}: {micros:.1f} us"
            )
    if given.only in (None, "model"):
        result["model"] = measure_model(given)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "parallel.json").write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-1b.json")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=("sums", "model"))
    return parser.parse_args()


# ---- sums


def in_pair(target: Callable[[int, str, Connection], None]) -> float:
    """The median time in us that ``target`` reports from rank 0 of two processes."""
    spawn = multiprocessing.get_context("spawn")
    memory = SharedMemory(create=True, size=segment_bytes(2, EXCHANGE_FLOATS))
    ours, theirs = spawn.Pipe()
    ranks = [
        spawn.Process(target=target, args=(rank, memory.name, theirs), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        return float(ours.recv())
    finally:
        for rank in ranks:
            rank.join()
        memory.close()
        memory.unlink()


def shared_sums(rank: int, memory: str, results: Connection) -> None:
    """Sums through shared memory."""
    own_core(rank)
    exchange = exchange_over(memory, rank)
    array = np.ones(SUM_SHAPE, np.float32).reshape(-1)
    report(rank, results, lambda: exchange.all_reduce(array))


def gloo_sums(rank: int, memory: str, results: Connection) -> None:
    """Sums by torch.distributed."""
    import torch
    from torch import distributed

    own_core(rank)
    torch.set_num_threads(1)
    store = f"file:///tmp/fuserve-{memory.strip('/')}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    tensor = torch.ones(SUM_SHAPE)
    report(rank, results, lambda: distributed.all_reduce(tensor))
    distributed.destroy_process_group()


def report(rank: int, results: Connection, once: Callable[[], None]) -> None:
    """Time ``once`` and send the median in us from rank 0."""
    times = []
    for _ in range(SUM_ROUNDS):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    if rank == 0:
        results.send(1e6 * median(times))


# ---- the model


def measure_model(given: argparse.Namespace) -> dict[str, Any]:
    """All ways to hold the model, in rounds."""
    config = json.loads(given.config.read_text())
    weights = DummyWeights(spec_from_config(config))
    half = weights.spec.num_layers // 2
    ways = (
        Ranks("one rank, 2 threads", (WHOLE_MODEL,), 2),
        Ranks("tensor parallel 2, 1 thread each", (Shard(0, 2), Shard(1, 2)), 1),
        Ranks("2 stages, 1 thread each", (Shard(0, 1, 0, half), Shard(0, 1, half)), 1),
    )
    rows: dict[str, Any] = {}
    groups = []
    for way in ways:
        group = Group(way, given)
        rows[way.label] = {"peak_rss_mb": [rss / 1e6 for rss in group.peak_rss]}
        if way.share_layers:
            groups.append(group)
        else:
            group.close()
    times: dict[str, list[tuple[float, float]]] = {group.way.label: [] for group in groups}
    for _ in range(given.repeat):
        for group in groups:
            times[group.way.label].append(group.run())
    for group in groups:
        runs = times[group.way.label]
        for name, pick in (("", median), ("best_", min)):
            rows[group.way.label] |= {
                f"{name}prefill_tokens_per_s": given.prompt_tokens / pick(run[0] for run in runs),
                f"{name}decode_tokens_per_s": given.streams / pick(run[1] for run in runs),
            }
        group.close()
    for way in ways:
        options = ExecutorOptions(quantization=given.quantization, quantize_embeddings=True)
        sizes = [part_bytes(weights, options, shard)[0] for shard in way.shards]
        rows[way.label]["packed_mb"] = [size / 1e6 for size in sizes]
        print(way.label, json.dumps(rounded(rows[way.label])))
    return rows


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a row as they are printed."""
    return {
        name: [round(one) for one in value] if isinstance(value, list) else round(value, 2)
        for name, value in row.items()
    }


class Group:
    """Processes that hold a model together."""

    def __init__(self, way: Ranks, given: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.way = way
        size = len(way.shards)
        self._memory = SharedMemory(create=True, size=segment_bytes(size, EXCHANGE_FLOATS))
        self._pipes, self._ranks = [], []
        for number in range(size):
            ours, theirs = spawn.Pipe()
            arguments = (number, way, given, self._memory.name, theirs)
            rank = spawn.Process(target=run_rank, args=arguments, daemon=True)
            rank.start()
            self._pipes.append(ours)
            self._ranks.append(rank)
        self.peak_rss = [int(pipe.recv()) for pipe in self._pipes]

    def run(self) -> tuple[float, float]:
        """Seconds of a prefill and of a decode step, as rank 0 sees them."""
        for pipe in self._pipes:
            pipe.send("run")
        times: list[tuple[float, float]] = [pipe.recv() for pipe in self._pipes]
        return times[0]

    def close(self) -> None:
        """End the processes."""
        for pipe, rank in zip(self._pipes, self._ranks, strict=True):
            pipe.send("stop")
            rank.join()
        self._memory.close()
        self._memory.unlink()


def run_rank(
    number: int, way: Ranks, given: argparse.Namespace, memory: str, pipe: Connection
) -> None:
    """One process: load a part, then run as told."""
    shard = way.shards[number]
    if way.threads == 1:
        own_core(number)
    blocks_each = -(-(given.prompt_tokens + given.output_tokens) // BLOCK_SIZE_TOKENS)
    communicator = None
    if shard.tensor_size > 1:
        shared = exchange_over(memory, number, shard.tensor_size)
        communicator = Communicator(shard.tensor_rank, shard.tensor_size, shared)
    executor = NativeExecutor(
        DummyWeights(spec_from_config(json.loads(given.config.read_text()))),
        ExecutorOptions(
            quantization=given.quantization, quantize_embeddings=True, num_threads=way.threads
        ),
        num_blocks=blocks_each * given.streams,
        max_model_len=blocks_each * BLOCK_SIZE_TOKENS,
        shard=shard,
        communicator=communicator,
    )
    if way.share_layers:
        steps(executor, given, blocks_each)  # warm-up, and all memory of a step
    else:
        stage_step(executor, given, blocks_each)
    pipe.send(peak_rss())
    while pipe.recv() == "run":
        pipe.send(steps(executor, given, blocks_each))


def steps(
    executor: NativeExecutor, given: argparse.Namespace, blocks_each: int
) -> tuple[float, float]:
    """Seconds of a prompt's prefill, and the median of the decode steps of all streams."""
    tokens = np.random.default_rng(0).integers(3, executor.spec.vocab_size, given.prompt_tokens)
    for stream in range(given.streams):
        start = time.perf_counter()
        executor.step(batch_of([tokens], 0, [stream], blocks_each))
        prefill_s = time.perf_counter() - start
    times = []
    for position in range(given.prompt_tokens, given.prompt_tokens + given.output_tokens):
        token = tokens[position % given.prompt_tokens : position % given.prompt_tokens + 1]
        batch = batch_of([token] * given.streams, position, list(range(given.streams)), blocks_each)
        start = time.perf_counter()
        executor.step(batch)
        times.append(time.perf_counter() - start)
    return prefill_s, median(times)


def stage_step(executor: NativeExecutor, given: argparse.Namespace, blocks_each: int) -> None:
    """A stage's prefill of all streams."""
    tokens = np.full(given.prompt_tokens, 5)
    hidden = np.zeros((given.prompt_tokens, executor.spec.hidden_size), np.float32)
    received = None if executor.shard.is_first_stage else hidden
    for stream in range(given.streams):
        executor.step(batch_of([tokens], 0, [stream], blocks_each), received)


def batch_of(
    chunks: list[np.ndarray], position: int, streams: list[int], blocks_each: int
) -> StepBatch:
    """A chunk of each stream from ``position`` on, with logits of its last token."""
    starts = np.cumsum([0, *map(len, chunks)]).astype(np.int32)
    tables = [np.arange(blocks_each) + stream * blocks_each for stream in streams]
    return StepBatch(
        tokens=np.concatenate(chunks).astype(np.int32),
        positions=np.concatenate([position + np.arange(len(c)) for c in chunks]).astype(np.int32),
        query_starts=starts,
        block_tables=np.array(tables, np.int32),
        logit_rows=starts[1:] - 1,
    )


# ---- processes


def own_core(rank: int) -> None:
    """Keep this process on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


_attached: list[SharedMemory] = []  # kept open as long as the process


def exchange_over(memory: str, rank: int, size: int = 2) -> SharedExchange:
    """This rank's end of the shared memory of that name."""
    attached = SharedMemory(memory)
    _attached.append(attached)
    return SharedExchange(
        np.frombuffer(attached.buf, np.uint8),
        rank=rank,
        size=size,
        floats=EXCHANGE_FLOATS,
        timeout_s=TIMEOUT_S,
    )


def peak_rss() -> int:
    """Bytes of the largest resident set so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
