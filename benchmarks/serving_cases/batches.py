"""Throughput of a mixed load: requests enter and leave at will, or in static batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fuserve.loadgen import (
    Completer,
    PlannedRequest,
    Run,
    ServingReport,
    Target,
    Vocabulary,
    Workload,
    drive,
    plan,
    summarize,
)

from .servers import RunningServer

GREEDY = {"temperature": 0.0, "ignore_eos": True}
WARM_UP_TOKENS = 8

Batching = Literal["continuous", "static", "padded"]
"""Static batching usually means "padded": groups in the order of arrival, each of which runs until
its longest output has ended, all rows computed to that end, prompts padded to the longest of the
group. "static" is a stricter peer: sequences leave their group when they have ended, and nothing is
padded, but nobody enters before all have left."""


@dataclass(frozen=True)
class Throughput:
    """Of one load: the tokens that were asked for, by second, and what their users waited."""

    output_tokens_per_s: float
    duration_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    report: ServingReport


def measure(
    server: RunningServer, workload: Workload, batching: Batching, slots: int
) -> Throughput:
    """Warm a server up, then load it.

    Args:
        server: what is measured.
        workload: its requests.
        batching: "continuous" sends all requests; "static" sends ``slots`` together and the next
            ones when all of them have ended; "padded" does so with every prompt and every output as
            long as the longest of its batch, as an engine computes them that cannot let a sequence
            leave. The padding does not count as throughput.
        slots: size of a static batch.
    """

    async def run() -> tuple[Run, list[PlannedRequest]]:
        target = Target(server.base_url, server.model, body=GREEDY)
        async with Completer(target) as completer:
            vocabulary = await completer.vocabulary()
            await _warm_up(completer, vocabulary, slots)
            requests = plan(workload, vocabulary)
            if batching == "continuous":
                return await drive(completer, requests), requests
            batches = [requests[i : i + slots] for i in range(0, len(requests), slots)]
            return await _drive_batches(completer, batches, padded=batching == "padded"), requests

    result, requests = asyncio.run(run())
    report = summarize(result)
    if report.errors or report.ttft_ms is None or report.tpot_ms is None:
        raise SystemExit(f"requests failed: {report.errors}")
    useful = sum(request.output_tokens for request in requests)
    if batching != "padded" and report.output_tokens != useful:
        raise SystemExit(f"{report.output_tokens} tokens came where {useful} were asked for")
    return Throughput(
        output_tokens_per_s=useful / result.duration_s,
        duration_s=result.duration_s,
        ttft_p50_ms=report.ttft_ms.p50,
        tpot_p50_ms=report.tpot_ms.p50,
        report=report,
    )


async def _warm_up(completer: Completer, vocabulary: Vocabulary, slots: int) -> None:
    """Touch the memory of every slot, so that a first run is like a later one."""
    tokens = list(vocabulary.token_ids[:WARM_UP_TOKENS]) or list(range(WARM_UP_TOKENS))
    request = PlannedRequest(0.0, vocabulary.prompt(tokens), WARM_UP_TOKENS)
    await drive(completer, [request] * slots)


async def _drive_batches(
    completer: Completer, batches: Sequence[Sequence[PlannedRequest]], *, padded: bool
) -> Run:
    """One batch after the other; every request was due when the first batch began."""
    answers = []
    start_s = end_s = 0.0
    for batch in batches:
        run = await drive(completer, _padded(batch) if padded else batch)
        start_s = start_s or run.start_s
        end_s = run.end_s
        for answer in run.answers:
            answer.due_s = start_s
        answers += run.answers
    return Run(start_s, end_s, answers)


def _padded(batch: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """All as long as the longest; a prompt is lengthened by tokens of its own."""
    longest = max(len(_tokens(request)) for request in batch)
    output_tokens = max(request.output_tokens for request in batch)
    return [
        replace(
            request,
            prompt=(_tokens(request) * longest)[:longest],
            output_tokens=output_tokens,
        )
        for request in batch
    ]


def _tokens(request: PlannedRequest) -> list[int]:
    if isinstance(request.prompt, str):
        raise SystemExit("static batches need a server that takes token ids as prompts")
    return request.prompt
