"""Steps that were given to the executor and whose results have not been read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fuserve.decoder.step import Executor, PipelinedExecutor, StepBatch
from fuserve.engine.contained_step import Contained, run_contained
from fuserve.engine.schedule import Schedule
from fuserve.engine.sequence import Chunk
from fuserve.engine.step_builder import ChunkResults, build_step, split_rows


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What came of a step, and how long the executor was at it and nothing before it."""

    schedule: Schedule
    outcome: Contained[list[ChunkResults]]
    execute_s: float


@dataclass(frozen=True, slots=True)
class _Begun:
    schedule: Schedule
    batch: StepBatch | None  # None: nothing has been done yet
    begun_s: float


class StepsInFlight:
    """Begins steps and finishes them in the same order; as many at once as the executor can.

    An executor without a pipeline does all the work in ``finish``, and a failing step is taken
    apart there; one with a pipeline fails as a whole, with ``RankFailedError``.

    Args:
        executor: nobody else may step it.
        clock: monotonic seconds.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._pipeline = executor if isinstance(executor, PipelinedExecutor) else None
        self._clock = clock
        self._begun: deque[_Begun] = deque()
        self._finished_s = clock()

    @property
    def capacity(self) -> int:
        """How many steps can be on their way."""
        return 1 if self._pipeline is None else self._pipeline.num_in_flight

    @property
    def has_room(self) -> bool:
        """Whether another step can begin."""
        return len(self._begun) < self.capacity

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, schedule: Schedule) -> None:
        """Start a step.

        Raises:
            RankFailedError: a rank of the executor has failed.
        """
        batch = None
        begun_s = self._clock()
        if self._pipeline is not None:
            batch = build_step(schedule.chunks)
            if schedule.copies:
                self._pipeline.copy_blocks(schedule.copies)
            self._pipeline.begin(batch)
        self._begun.append(_Begun(schedule, batch, begun_s))

    def finish(self) -> FinishedStep:
        """Wait for the oldest step.

        Raises:
            RankFailedError: a rank of the executor has failed.
        """
        begun = self._begun.popleft()
        schedule = begun.schedule
        if self._pipeline is not None and begun.batch is not None:
            logits = self._pipeline.finish()
            results = split_rows(schedule.chunks, logits, begun.batch.hidden)
            outcome = Contained([(schedule.chunks, results)], [])
        else:
            if schedule.copies:
                self._executor.copy_blocks(schedule.copies)
            outcome = run_contained(self._execute, schedule.chunks)
        started_s, self._finished_s = max(begun.begun_s, self._finished_s), self._clock()
        return FinishedStep(schedule, outcome, self._finished_s - started_s)

    def forget(self) -> None:
        """The steps on their way will never end."""
        self._begun.clear()

    def _execute(self, chunks: list[Chunk]) -> list[ChunkResults]:
        batch = build_step(chunks)
        return split_rows(chunks, self._executor.step(batch), batch.hidden)
