"""The fake model as an executor with steps in flight, whose ranks fail when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fuserve.decoder.step import StepBatch
from fuserve.errors import RankFailedError
from tests.engine.fake_model import FakeExecutor, Logits


class PipelinedFake(FakeExecutor):
    """Does everything as late as it may: a step is computed when its results are wanted."""

    def __init__(self, num_in_flight: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.num_in_flight = num_in_flight
        self.failure: RankFailedError | None = None
        self.num_restarts = 0
        self.restarts_to_fail = 0
        self.most_in_flight = 0
        self._todo: deque[StepBatch | list[tuple[int, int]]] = deque()
        self._notify: Callable[[], None] = lambda: None

    def fail(self, reason: str) -> None:
        self.failure = RankFailedError(reason)
        self._notify()

    def begin(self, batch: StepBatch) -> None:
        self._check()
        self._todo.append(batch)
        in_flight = sum(isinstance(one, StepBatch) for one in self._todo)
        assert in_flight <= self.num_in_flight
        self.most_in_flight = max(self.most_in_flight, in_flight)

    def finish(self) -> Logits:
        self._check()
        while True:
            next_one = self._todo.popleft()
            if isinstance(next_one, StepBatch):
                return super().step(next_one)
            super().copy_blocks(next_one)

    def step(self, batch: StepBatch) -> Logits:
        self.begin(batch)
        return self.finish()

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._check()
        self._todo.append(list(pairs))

    def on_failure(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def restart(self) -> None:
        if self.restarts_to_fail > 0:
            self.restarts_to_fail -= 1
            raise RankFailedError("rank 1 does not start")
        self._todo.clear()
        self._cache[:] = -1
        self.num_restarts += 1
        self.failure = None

    def _check(self) -> None:
        if self.failure is not None:
            raise RankFailedError(str(self.failure))
