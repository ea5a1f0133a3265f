"""Prefill and decode speed of an executor, and how near it comes to the machine's bounds.

The executor is stepped directly with greedy argmax: no scheduler, no sampler, no tokenizer. Every
sequence has its own tokens and its own KV cache; nothing is shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import Executor
from fuserve.engine.direct import Chunk, FixedSlots


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Decoding ``batch`` sequences together; medians over repeats."""

    batch: int
    tokens_per_s: float
    step_ms: float


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Medians over repeats; ``prefill_tokens_per_s`` is of one sequence alone."""

    prompt_tokens: int
    output_tokens: int
    prefill_tokens_per_s: float
    prefill_runs: int
    decode: tuple[DecodeSpeed, ...]


def measure_latency(
    executor: Executor,
    *,
    prompt_tokens: int,
    output_tokens: int,
    batches: Sequence[int],
    repeat: int,
    max_num_batched_tokens: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> LatencyResult:
    """Prefill random prompts one after another, then decode them in batches of each size.

    A prompt's cache is filled once and every repeat of the decoding starts from it again, so the
    context length is the same in all of them.

    Args:
        executor: its cache must hold ``max(batches)`` sequences of prompt and output.
        prompt_tokens: length of a prompt.
        output_tokens: decode steps per repeat, all at contexts from ``prompt_tokens`` on.
        batches: numbers of sequences decoded together.
        repeat: measurements of each figure.
        max_num_batched_tokens: token budget of a step; longer prompts run in chunks.
        seed: of the random prompts.
        progress: called with the stage, the measurements done, and those in all.

    Raises:
        CapacityError: if the cache is too small.
    """
    slots = FixedSlots(max(batches), prompt_tokens + output_tokens)
    slots.check_fits(executor.num_blocks)
    prompts = np.random.default_rng(seed).integers(
        0, executor.spec.vocab_size, size=(slots.num_slots, prompt_tokens), dtype=np.int32
    )  # [slots, prompt_tokens]
    runner = StepRunner(executor, slots, max_num_batched_tokens)
    runner.prefill(0, prompts[0])  # warms caches, pages and the thread pool
    runs = max(repeat, slots.num_slots)
    total = runs + repeat * len(batches)
    tell = progress or _silent

    prefill_s: list[float] = []
    next_tokens = np.zeros(slots.num_slots, dtype=np.int32)
    for run in range(runs):
        slot = run % slots.num_slots
        next_tokens[slot], seconds = runner.prefill(slot, prompts[slot])
        prefill_s.append(seconds)
        tell("prefill", run + 1, total)

    decode_s: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(repeat):  # sizes take turns, so that drift of the machine hits all alike
        for index, batch in enumerate(batches):
            first = next_tokens[:batch]
            decode_s[batch].append(runner.decode(first, prompt_tokens, output_tokens))
            tell("decode", runs + turn * len(batches) + index + 1, total)
    return LatencyResult(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tokens_per_s=prompt_tokens / median(prefill_s),
        prefill_runs=runs,
        decode=tuple(
            _decode_speed(batch, output_tokens, median(seconds))
            for batch, seconds in decode_s.items()
        ),
    )


def _decode_speed(batch: int, steps: int, seconds: float) -> DecodeSpeed:
    return DecodeSpeed(batch, batch * steps / seconds, seconds / steps * 1e3)


def _silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Prefills and decodes in fixed slots of an executor's cache, timing each."""

    executor: Executor
    slots: FixedSlots
    budget: int

    def prefill(self, slot: int, prompt: npt.NDArray[np.int32]) -> tuple[int, float]:
        """Fill a slot's cache; return the next token and the seconds."""
        started = time.perf_counter()
        logits: npt.NDArray[np.float32] | None = None
        for start in range(0, len(prompt), self.budget):
            tokens = prompt[start : start + self.budget]
            is_last = start + len(tokens) == len(prompt)
            logits_from = len(tokens) - 1 if is_last else len(tokens)
            chunk = Chunk(slot, start, tokens, logits_from)
            logits = self.executor.step(self.slots.step_batch([chunk]))
        assert logits is not None, "a prompt has at least one token"
        next_token = int(logits[0].argmax())
        return next_token, time.perf_counter() - started

    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        """Decode greedily from ``context`` tokens on; return the seconds."""
        tokens = first.copy()  # [batch]
        started = time.perf_counter()
        for position in range(context, context + steps):
            chunks = [
                Chunk(slot, position, tokens[slot : slot + 1], 0) for slot in range(len(tokens))
            ]
            logits = self.executor.step(self.slots.step_batch(chunks))  # [batch, vocab]
            tokens = logits.argmax(axis=1).astype(np.int32)
        return time.perf_counter() - started
