"""What does a guided step of Stable Diffusion 1.5 take over ranks of one host?

- one process with all threads;
- the halves of guidance in two processes (``--cfg-parallel 2``);
- bands of the image in two processes (``--patch-parallel 2``).

All have as many threads together, and random weights of the full configuration. The ways of one
round follow each other, medians are printed, and results must be equal to the bit.

    python benchmarks/image_ranks.py --size 512 --rounds 2
    python benchmarks/image_ranks.py --folder MODEL/unet --latents 16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from diffusion_peers import random_folder
from peers.worker import peak_rss_bytes

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights
from fuserve.diffusion.program import Array, Executor, Program
from fuserve.diffusion.rank_executor import RankExecutor
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.weights import CheckpointWeights
from fuserve.kernels.exchange import segment_bytes
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from fuserve.parallel.placement import on_cpus, place_ranks
from fuserve.parallel.segment import Segment

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = 77
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """One way to take the step."""

    label: str
    kind: str  # alone, halves, bands
    count: int


WAYS = (
    Ranks("one process", "alone", 1),
    Ranks("--cfg-parallel 2", "halves", 2),
    Ranks("--patch-parallel 2", "bands", 2),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of a UNet; by default random weights")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--latents", type=int, help="latents of a side, instead of --size / 8")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="in each round")
    given = parser.parse_args()
    folder = given.folder or random_folder() / "unet"
    side = given.latents or given.size // 8
    seconds: list[list[float]] = [[] for _ in WAYS]
    memory: list[list[int]] = [[] for _ in WAYS]
    expected = None
    for _ in range(given.rounds):
        for index, way in enumerate(WAYS):  # one at a time: each takes gigabytes
            with started(way, folder, side, given.threads // way.count) as group:
                predicted(group)  # packs the weights
                for _ in range(given.steps):
                    taken, prediction = predicted(group)
                    seconds[index].append(taken)
                memory[index] = [asked(rank, "memory") for rank in group]
            expected = prediction if expected is None else expected
            assert np.array_equal(prediction, expected), way.label
    rows = [
        {"label": way.label, "seconds": median(seconds[index]), "peak_rss_bytes": memory[index]}
        for index, way in enumerate(WAYS)
    ]
    for row in rows:
        each = " + ".join(f"{used / 1e9:.2f}" for used in row["peak_rss_bytes"])
        speedup = rows[0]["seconds"] / row["seconds"]
        print(f"{row['label']:20} {row['seconds']:8.3f} s  {speedup:.2f} x  {each} GB")
    RESULTS.mkdir(exist_ok=True)
    result = {"latents": side, "threads": given.threads, "rounds": given.rounds, "ways": rows}
    (RESULTS / "image_ranks.json").write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def started(way: Ranks, folder: Path, side: int, threads: int) -> Iterator[list[Connection]]:
    """The processes of one way, as pipes to them."""
    context = multiprocessing.get_context("fork")
    segment = Segment.create(segment_bytes(way.count, EXCHANGE_FLOATS))
    pipes, processes = [], []
    for rank in range(way.count):
        ours, theirs = context.Pipe()
        work = (way, rank, folder, side, threads, segment, theirs)
        processes.append(context.Process(target=serve, args=work, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send("stop")
        for process in processes:
            process.join()


def predicted(group: Sequence[Connection]) -> tuple[float, Array]:
    """Seconds of a step, and what it gives, from all ranks at once."""
    for pipe in group:
        pipe.send("step")
    answers = [pipe.recv() for pipe in group]
    return max(seconds for seconds, _ in answers), answers[0][1]


def asked(pipe: Connection, question: str) -> Any:
    """What a process answers."""
    pipe.send(question)
    return pipe.recv()


def serve(
    way: Ranks,
    rank: int,
    folder: Path,
    side: int,
    threads: int,
    segment: Segment,
    pipe: Connection,
) -> None:
    """A rank: steps when it is told to."""
    with on_cpus(place_ranks(way.count)[rank]):
        pool = ThreadPool(threads)
    spec = unet_spec(Fields(json.loads((folder / "config.json").read_text())))
    (file,) = folder.glob("*.safetensors")
    weights = PackedWeights(CheckpointWeights(StoredTensors.of_file(file)), pool)
    workspace = NativeWorkspace(pool)
    communicator = LocalCommunicator(segment.memory, rank, way.count, TIMEOUT_S)
    pair = unet_program(spec, 1, 2, side, side, tokens=TOKENS)
    inputs = drawn(pair)

    executor: Executor
    if way.kind == "halves":
        executor = NativeProgram(
            unet_program(spec, 1, 1, side, side, tokens=TOKENS), weights, workspace
        )
        inputs = {name: one if len(one) == 1 else one[[rank]] for name, one in inputs.items()}
    elif way.kind == "bands":
        executor = RankExecutor(pair, ["latents"], weights, workspace, communicator)
    else:
        executor = NativeProgram(pair, weights, workspace)

    def step() -> Array:
        own = executor.run(inputs)["prediction"]
        if way.kind != "halves":
            return own
        parts = [own if part == rank else np.empty_like(own) for part in range(2)]
        communicator.all_gather(parts)
        return np.concatenate(parts)

    while (question := pipe.recv()) != "stop":
        if question == "memory":
            pipe.send(peak_rss_bytes())
            continue
        began_s = time.perf_counter()
        prediction = step()
        pipe.send((time.perf_counter() - began_s, prediction))


def drawn(program: Program) -> dict[str, Array]:
    """Random inputs, the same in all processes."""
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(value.shape, dtype=np.float32)
        for name, value in program.inputs.items()
    }


if __name__ == "__main__":
    main()
