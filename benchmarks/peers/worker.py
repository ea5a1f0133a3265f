"""What the workers share: their arguments, their prompts, and the one JSON line they answer.

Each worker runs one engine on one model in a process of its own and measures the same things: the
time to load, the prefill of one prompt, the decoding of several sequences together, and the
process's peak memory. Only numpy is needed here, so that it runs in any engine's environment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Work:
    """What to measure."""

    model: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    batches: tuple[int, ...]
    options: tuple[str, ...]


class Engine(Protocol):
    """A loaded model whose sequences are numbered from 0."""

    vocab_size: int

    def prefill(self, prompts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], list[float]]:
        """Fill the caches with prompts [sequences, tokens]; next tokens, seconds of single ones."""
        ...

    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        """Decode the first ``len(first)`` sequences greedily from ``context``; seconds."""
        ...


def parse_work() -> Work:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    parser.add_argument("--batch", required=True)
    parser.add_argument("--option", action="append", default=[])
    given = parser.parse_args()
    return Work(
        model=given.model,
        threads=given.threads,
        prompt_tokens=given.prompt_tokens,
        output_tokens=given.output_tokens,
        batches=tuple(int(batch) for batch in given.batch.split(",")),
        options=tuple(given.option),
    )


def run(load: Callable[[Work], Engine]) -> None:
    """Load, measure, and print the result as the last line of stdout."""
    work = parse_work()
    started = time.perf_counter()
    engine = load(work)
    load_s = time.perf_counter() - started
    prompts = np.random.default_rng(0).integers(
        0, engine.vocab_size, size=(max(work.batches), work.prompt_tokens), dtype=np.int32
    )
    engine.prefill(prompts[:1])  # warm-up
    first, prefill_s = engine.prefill(prompts)
    decode = {
        str(batch): decode_tokens_per_s(engine, first[:batch], work) for batch in work.batches
    }
    result = {
        "load_s": load_s,
        "prefill_tokens_per_s": work.prompt_tokens / median(prefill_s),
        "decode_tokens_per_s": decode,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


def decode_tokens_per_s(engine: Engine, first: npt.NDArray[np.int32], work: Work) -> float:
    """Tokens per second over all sequences of one batch."""
    seconds = engine.decode(first, work.prompt_tokens, work.output_tokens)
    return len(first) * work.output_tokens / seconds


def peak_rss_bytes() -> int:
    """VmHWM: unlike getrusage's figure, it starts anew with each program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def option(options: Sequence[str], name: str, default: str = "") -> str:
    """The value of ``--option name=value``."""
    for text in options:
        key, _, value = text.partition("=")
        if key == name:
            return value
    return default
