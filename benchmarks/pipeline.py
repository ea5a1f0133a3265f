"""What do processes cost where threads would do: stages of a pipeline, and what binds them?

Several streams at once through the whole engine, over one process with two threads and over two
stages of one thread each, in turns. The weights are random, except those of the demo model. Then
the way of a command from rank 0 to another
rank and back, which every step pays, and how long a killed rank takes to be back.

    python benchmarks/pipeline.py --repeat 3
    python benchmarks/pipeline.py --model demo --quantization none
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fuserve.decoder import ExecutorOptions, LoadedModel
from fuserve.decoder.step import StepBatch
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.sampling_params import SamplingParams
from fuserve.parallel.commands import Step, decode, encode
from fuserve.parallel.group_executor import GroupExecutor
from fuserve.parallel.loading import load_parallel
from fuserve.parallel.options import ParallelOptions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model."""

    label: str
    parallel: ParallelOptions
    threads: int


WAYS = (
    Way("one process, two threads", ParallelOptions(), 2),
    Way("two stages by bytes", ParallelOptions(1, 2), 1),
    Way("two stages by time", ParallelOptions(1, 2, balance="measured"), 1),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(HERE / "configs" / "llama-1b.json"))
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    models = {way.label: load(given, way) for way in WAYS}
    speeds: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(given.repeat):
        for label, loaded in models.items():
            speeds[label].append(tokens_per_s(loaded, given))
    base = median(speeds[WAYS[0].label])
    print(f"{given.streams} streams of {Path(given.model).stem}, {given.quantization}: tokens/s")
    for label, values in speeds.items():
        print(f"  {label:28} {median(values):8.1f}  {median(values) / base:6.0%}")
    executor = models[WAYS[1].label].executor
    assert isinstance(executor, GroupExecutor)
    way_us, back_s = command_us(), restart_s(executor)
    for loaded in models.values():
        loaded.close()
    print(f"a command to another process, and its answer: {way_us:.0f} us")
    print(f"from kill -9 to running again: {back_s:.2f} s")
    RESULTS.mkdir(exist_ok=True)
    report: dict[str, Any] = {
        "arguments": vars(given),
        "tokens_per_s": speeds,
        "command_us": way_us,
        "restart_s": back_s,
    }
    (RESULTS / "pipeline.json").write_text(json.dumps(report, indent=2) + "\n")


def load(given: argparse.Namespace, way: Way) -> LoadedModel:
    """The model, run in this way."""
    options = ExecutorOptions(
        quantization=None if given.quantization == "none" else given.quantization,
        load_format="dummy" if given.model.endswith(".json") else "auto",
        max_model_len=given.prompt_tokens + given.output_tokens + WARM_UP_TOKENS,
        max_num_seqs=given.streams,
        num_threads=way.threads,
    )
    return load_parallel(given.model, options, way.parallel)


def tokens_per_s(loaded: LoadedModel, given: argparse.Namespace) -> float:
    """Tokens generated a second by all streams while all of them decode."""
    config = EngineConfig(loaded.max_model_len, given.streams, enable_prefix_caching=False)
    engine = Engine(loaded.executor, None, config)
    dice = np.random.default_rng(0)
    num_tokens = given.output_tokens + WARM_UP_TOKENS
    for _ in range(given.streams):
        prompt = dice.integers(0, loaded.spec.vocab_size, given.prompt_tokens).tolist()
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        engine.add_request(prompt, params)
    seen: dict[str, int] = {}
    while len(seen) < given.streams or min(seen.values()) < WARM_UP_TOKENS:
        count(engine, seen)
    start_s, before = time.perf_counter(), sum(seen.values())
    while max(seen.values()) < num_tokens:
        count(engine, seen)
    speed = (sum(seen.values()) - before) / (time.perf_counter() - start_s)
    while engine.has_unfinished:  # no step may stay in flight: another engine comes
        engine.step()
    return speed


def count(engine: Engine, seen: dict[str, int]) -> None:
    """One step; notes the tokens of each request."""
    for update in engine.step():
        seen[update.request_id] = seen.get(update.request_id, 0) + len(update.pieces)


def command_us(rounds: int = 2000) -> float:
    """A command to another process and its answer through pipes, as each step of a stage has."""
    command = encode(Step(0, a_step()))
    ours, theirs = multiprocessing.Pipe()
    echo = multiprocessing.get_context("spawn").Process(target=answer, args=(theirs,), daemon=True)
    echo.start()
    ours.recv_bytes()
    seconds = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        ours.send_bytes(command.tobytes())
        ours.recv_bytes()
        seconds.append(time.perf_counter() - start_s)
    echo.kill()
    return median(seconds) * 1e6


def answer(pipe: Connection) -> None:
    """Take each command apart and answer with a number."""
    pipe.send_bytes(b"ready")
    while True:
        decode(np.frombuffer(pipe.recv_bytes(), np.int32))
        pipe.send_bytes((0).to_bytes(8, "little"))


def a_step() -> StepBatch:
    """Eight sequences that decode."""
    rows = np.arange(8, dtype=np.int32)
    return StepBatch(rows, rows, np.arange(9, dtype=np.int32), rows[:, None].repeat(16, 1), rows)


def restart_s(executor: GroupExecutor) -> float:
    """From a rank's death until the group can step again."""
    start_s = time.perf_counter()
    os.kill(executor.process_ids[0], signal.SIGKILL)
    while executor.failure is None:
        time.sleep(0.001)
    executor.restart()
    executor.step(a_step())
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
