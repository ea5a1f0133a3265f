"""Runs engines on their own thread over the fake model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fuserve.decoder.step import StepBatch
from fuserve.engine.async_engine import AsyncEngine
from fuserve.engine.engine import Engine
from fuserve.engine.outputs import Piece, RequestOutput, RequestUpdate
from fuserve.engine.request_stream import RequestStream
from fuserve.engine.stats import EngineStats, StepStats
from tests.engine.driving import make_engine
from tests.engine.fake_model import FakeExecutor, Logits


class GatedExecutor(FakeExecutor):
    """Runs a step only when it is let: a test decides what happens between two steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._may_run = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)

    def step(self, batch: StepBatch) -> Logits:
        self._arrived.release()
        assert self._may_run.acquire(timeout=30)
        return super().step(batch)

    async def wait_for_step(self) -> None:
        """Until the engine's thread is inside a step."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=30)

    def let(self, num_steps: int) -> None:
        self._may_run.release(num_steps)


class Observer:
    def __init__(self) -> None:
        self.steps: list[tuple[StepStats, EngineStats]] = []
        self.outputs: list[RequestOutput] = []
        self.finished = threading.Semaphore(0)

    def on_step(self, step: StepStats, stats: EngineStats) -> None:
        self.steps.append((step, stats))

    def on_finished(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.finished.release()

    async def wait_finished(self, num_requests: int = 1) -> None:
        for _ in range(num_requests):
            assert await asyncio.to_thread(self.finished.acquire, timeout=30)


@asynccontextmanager
async def running(engine: Engine | None = None, **options: Any) -> AsyncIterator[AsyncEngine]:
    """A started engine that is stopped at the end."""
    served = AsyncEngine(engine or make_engine(), **options)
    served.start()
    try:
        yield served
    finally:
        await served.drain(0)


async def read_all(stream: RequestStream[RequestUpdate]) -> tuple[RequestOutput, list[Piece]]:
    pieces: list[Piece] = []
    async for update in stream:
        pieces += update.pieces
        if update.output is not None:
            output = update.output
    return output, pieces


def prompt(number: int, length: int = 10) -> Sequence[int]:
    """Prompts that differ from their first token on."""
    return [number % 256, number // 256, *range(length - 2)]
