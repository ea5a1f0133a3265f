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
STREAM_TOKENS = 256
LONG_PROMPT_TOKENS = 4096
SHARED_TOKENS, OWN_TOKENS = 1024, 16
MODEL_KINDS = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class LongPrompt:
    """Gaps between tokens of running streams, in ms; ``worst`` while a long prompt was computed.

    Args:
        alone: the median with no prompt beside them.
        beside: the median while it was computed.
    """

    alone_ms: float
    beside_ms: float
    worst_ms: float
    prefill_s: float

    @property
    def ratio(self) -> float:
        """The worst gap by the streams' own pace before the prompt came: the stricter median."""
        return self.worst_ms / self.alone_ms


def measure_long_prompt(server: RunningServer, num_streams: int = NUM_STREAMS) -> LongPrompt:
    """Start streams, then send a prompt of 4096 tokens while they run."""

    async def run() -> tuple[list[Answer], Answer]:
        async with _completer(server) as completer:
            vocabulary = await completer.vocabulary()
            streams = plan(_even(num_streams, 32, STREAM_TOKENS), vocabulary)
            (long_one,) = plan(_even(1, LONG_PROMPT_TOKENS, 1), vocabulary)
            under_way: set[int] = set()
            all_under_way = asyncio.Event()

            def watch(answer: Answer) -> None:
                if len(answer.chunk_s) == STREAM_TOKENS // 4:
                    under_way.add(id(answer))
                    if len(under_way) == num_streams:
                        all_under_way.set()

            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(completer.complete(request, clock_s(), watch))
                    for request in streams
                ]
                await all_under_way.wait()
                long_answer = await completer.complete(long_one, clock_s())
            return [task.result() for task in tasks], long_answer

    answers, prompt = asyncio.run(run())
    _check([*answers, prompt])
    alone: list[float] = []
    beside: list[float] = []
    for answer in answers:
        steady = answer.chunk_s[STREAM_TOKENS // 8 :]  # all streams run by then
        for begin_s, end_s in pairwise(steady):
            if end_s < prompt.due_s:
                alone.append(end_s - begin_s)
            elif begin_s < prompt.chunk_s[0]:
                beside.append(end_s - begin_s)
    return LongPrompt(
        alone_ms=median(alone) * 1e3,
        beside_ms=median(beside) * 1e3,
        worst_ms=max(beside) * 1e3,
        prefill_s=prompt.chunk_s[0] - prompt.due_s,
    )


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
