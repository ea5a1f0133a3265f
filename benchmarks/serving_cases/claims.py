"""Figures that the server promises besides its throughput."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from fuserve.loadgen import (
    Answer,
    Completer,
    Run,
    Target,
    TokenRange,
    Workload,
    drive,
    plan,
)
from fuserve.loadgen.client import clock_s

from .batches import GREEDY
from .servers import RunningServer

NUM_STREAMS = 8
STREAM_TOKENS = 2048  # more than come while the prompt is read; who streams then leaves
STEADY_FROM_TOKEN, MEASURED_TOKENS = 32, 64
LONG_PROMPT_TOKENS = 4096
SHARED_TOKENS, OWN_TOKENS = 1024, 16
MODEL_KINDS = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class LongPrompt:
    """Gaps between tokens of running streams while a long prompt is computed, in ms.

    Args:
        before: the median before the prompt came.
        beside: the median while it was computed.
        after: the median once it was done; more than before, as the streams' contexts have grown.
        worst: while it was computed.
        ratio: the largest gap by the streams' own pace at that time, between before and after.
    """

    before_ms: float
    beside_ms: float
    after_ms: float
    worst_ms: float
    ratio: float
    prefill_s: float


def measure_long_prompt(server: RunningServer, num_streams: int = NUM_STREAMS) -> LongPrompt:
    """Start streams, send a prompt of 4096 tokens while they run, and let them run on after it."""
    answers, prompt = asyncio.run(_long_prompt_beside_streams(server, num_streams))
    _check([prompt])
    begin_s, end_s = prompt.due_s, prompt.chunk_s[0]
    gaps = [
        gap for answer in answers.values() for gap in pairwise(answer.chunk_s[STEADY_FROM_TOKEN:])
    ]
    before_s = median(late - early for early, late in gaps if late < begin_s)
    after_s = median(late - early for early, late in gaps if early > end_s)
    beside = [(early, late - early) for early, late in gaps if early < end_s and late > begin_s]

    def pace_s(at_s: float) -> float:
        return before_s + (after_s - before_s) * (at_s - begin_s) / (end_s - begin_s)

    return LongPrompt(
        before_ms=before_s * 1e3,
        beside_ms=median(gap_s for _, gap_s in beside) * 1e3,
        after_ms=after_s * 1e3,
        worst_ms=max(gap_s for _, gap_s in beside) * 1e3,
        ratio=max(gap_s / pace_s(max(early_s, begin_s)) for early_s, gap_s in beside),
        prefill_s=end_s - begin_s,
    )


async def _long_prompt_beside_streams(
    server: RunningServer, num_streams: int
) -> tuple[dict[int, Answer], Answer]:
    """The streams' answers, cut off at the end, and the long prompt's."""
    answers: dict[int, Answer] = {}
    async with _completer(server) as completer:
        vocabulary = await completer.vocabulary()
        streams = plan(_even(num_streams, 32, STREAM_TOKENS), vocabulary)
        (long_one,) = plan(_even(1, LONG_PROMPT_TOKENS, 1), vocabulary)
        news = asyncio.Event()

        def watch(answer: Answer) -> None:
            answers[id(answer)] = answer
            news.set()

        async def all_have(num_tokens: int) -> None:
            while min((len(a.chunk_s) for a in answers.values()), default=0) < num_tokens or (
                len(answers) < num_streams
            ):
                news.clear()
                await news.wait()

        tasks = [
            asyncio.create_task(completer.complete(request, clock_s(), watch))
            for request in streams
        ]
        await all_have(STEADY_FROM_TOKEN + MEASURED_TOKENS)
        prompt = await completer.complete(long_one, clock_s())
        longest = max(len(answer.chunk_s) for answer in answers.values())
        await all_have(longest + MEASURED_TOKENS)
        for task in tasks:
            if not task.cancel():
                raise SystemExit("a stream ended while it was measured")
        await asyncio.gather(*tasks, return_exceptions=True)
    return answers, prompt


@dataclass(frozen=True)
class Prefill:
    """Of 16 prompts with a common beginning: the time of the steps that computed prompts."""

    seconds: float
    cached_tokens: int
    texts: list[str]


def measure_shared_prefix(server: RunningServer) -> Prefill:
    """Send 16 prompts that begin with the same 1024 tokens."""

    async def run() -> Run:
        async with _completer(server) as completer:
            vocabulary = await completer.vocabulary()
            workload = Workload(
                16, TokenRange(OWN_TOKENS, OWN_TOKENS), TokenRange(8, 8), SHARED_TOKENS
            )
            return await drive(completer, plan(workload, vocabulary))

    before = server.metrics()
    result = asyncio.run(run())
    after = server.metrics()
    _check(result.answers)

    return Prefill(
        seconds=_grown(before, after, "fuserve:step_time_seconds_sum", ("prefill", "mixed")),
        cached_tokens=round(_grown(before, after, "fuserve:prefix_cache_hits_total", ("",))),
        texts=[answer.text for answer in result.answers],
    )


@dataclass(frozen=True)
class Overhead:
    """Shares of the time at 16 streams: outside the model within steps, and by the clock."""

    in_steps: float
    by_clock: float
    step_ms: float


def measure_overhead(server: RunningServer) -> Overhead:
    """Run 16 streams and compare the clock with the time inside the model."""

    async def run() -> Run:
        async with _completer(server) as completer:
            vocabulary = await completer.vocabulary()
            return await drive(completer, plan(_even(16, 64, 128), vocabulary))

    before = server.metrics()
    result = asyncio.run(run())
    after = server.metrics()
    _check(result.answers)
    steps_s = _grown(before, after, "fuserve:step_time_seconds_sum", MODEL_KINDS)
    outside_s = _grown(before, after, "fuserve:step_overhead_seconds_sum", ("",))
    num_steps = _grown(before, after, "fuserve:step_time_seconds_count", MODEL_KINDS)
    return Overhead(
        in_steps=outside_s / steps_s,
        by_clock=1 - (steps_s - outside_s) / result.duration_s,
        step_ms=steps_s / num_steps * 1e3,
    )


def _completer(server: RunningServer) -> Completer:
    return Completer(Target(server.base_url, server.model, body=GREEDY))


def _even(count: int, prompt_tokens: int, output_tokens: int) -> Workload:
    """Requests of one length each."""
    return Workload(
        count, TokenRange(prompt_tokens, prompt_tokens), TokenRange(output_tokens, output_tokens)
    )


def _grown(
    before: Mapping[tuple[str, str], float],
    after: Mapping[tuple[str, str], float],
    name: str,
    kinds: Sequence[str],
) -> float:
    """By how much a counter has grown, over some values of its label ``kind``."""
    return sum(after.get((name, kind), 0.0) - before.get((name, kind), 0.0) for kind in kinds)


def _check(answers: Sequence[Answer]) -> None:
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first by: {failed[0]}")
