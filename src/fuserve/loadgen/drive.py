"""Sends a plan's requests when they are due, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from fuserve.loadgen.client import Answer, Completer, clock_s
from fuserve.loadgen.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a plan, in its order; it began at ``start_s`` of the client's clock."""

    start_s: float
    end_s: float
    answers: list[Answer]

    @property
    def duration_s(self) -> float:
        """From the start to the last byte."""
        return self.end_s - self.start_s


async def drive(
    completer: Completer,
    requests: Sequence[PlannedRequest],
    *,
    max_concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Send every request at its arrival.

    Args:
        completer: the server.
        requests: by arrival.
        max_concurrency: requests in flight at once; one that must wait for its turn is due only
            then, so that its latency is the server's and not the queue's in front of it.
        progress: called with the requests answered and those in all.
    """
    turns: AbstractAsyncContextManager[object] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    start_s = clock_s()
    done = 0

    async def send(request: PlannedRequest) -> Answer:
        nonlocal done
        due_s = start_s + request.arrival_s
        await asyncio.sleep(due_s - clock_s())
        async with turns:
            answer = await completer.complete(
                request, due_s if max_concurrency is None else clock_s()
            )
        done += 1
        if progress is not None:
            progress(done, len(requests))
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(request)) for request in requests]
    answers = [task.result() for task in tasks]
    return Run(start_s, max((answer.end_s for answer in answers), default=start_s), answers)
