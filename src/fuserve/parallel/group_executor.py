"""GroupExecutor: an executor whose model is spread over several processes, its ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import numpy.typing as npt

from fuserve.architectures import DecoderSpec
from fuserve.decoder.packing import Progress
from fuserve.decoder.step import StepBatch
from fuserve.errors import FuserveError, RankFailedError
from fuserve.parallel.commands import Step, Stop, copies
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.running import RunningRanks, StartRanks
from fuserve.parallel.shard_loading import ShardReport
from fuserve.parallel.slots import SlotSizes

_LEAVE_S = 5.0

Floats = npt.NDArray[np.float32]


class GroupExecutor:
    """Rank 0 of a group: runs its own part of the model, and has the others run theirs.

    A ``PipelinedExecutor``: as many steps can be in flight as there are stages.

    Args:
        spec: of the whole model.
        num_blocks: of each rank's KV cache.
        layout: who has which part.
        sizes: of what goes from stage to stage.
        start: starts the ranks, now and again after a failure.
        progress: called while parts are loaded.

    Raises:
        RankFailedError, CheckpointError, CapacityError: as ``start``.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        num_blocks: int,
        layout: GroupLayout,
        sizes: SlotSizes,
        start: StartRanks,
        progress: Progress | None = None,
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.num_in_flight = layout.num_stages
        self.failure: RankFailedError | None = None
        self._sizes = sizes
        self._start = start
        self._notify: Callable[[], None] = lambda: None
        self._begun: deque[tuple[int, StepBatch, Floats]] = deque()
        self._num_steps = 0
        self._ranks: RunningRanks | None = start(self._failed, progress)

    @property
    def reports(self) -> list[ShardReport]:
        """What each rank holds; empty while there are none."""
        return [] if self._ranks is None else self._ranks.reports

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that run beside this one."""
        return [] if self._ranks is None else self._ranks.group.process_ids

    def step(self, batch: StepBatch) -> Floats:
        """Run all layers over the batch, while no other step is in flight; see ``Executor.step``.

        Raises:
            RankFailedError: a rank has died, hangs or cannot be reached.
        """
        self.begin(batch)
        return self.finish()

    def begin(self, batch: StepBatch) -> None:
        """Start a step; see ``PipelinedExecutor``.

        Raises:
            CapacityError: it has more tokens than were planned for.
        """
        self._sizes.check(batch)
        number = self._num_steps
        self._num_steps += 1
        with self._stepping() as ranks:
            ranks.links.broadcast(Step(number, batch))
            output = ranks.own.step(batch)
            if self.num_in_flight > 1:
                ranks.links.send_hidden(number, output)
        self._begun.append((number, batch, output))

    def finish(self) -> Floats:
        """Results of the oldest step; see ``PipelinedExecutor``."""
        number, batch, output = self._begun.popleft()
        if self.num_in_flight == 1:
            return output
        with self._stepping() as ranks:
            logits, batch.hidden = ranks.links.receive_results(number, batch)
        return logits

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all ranks.

        Raises:
            RankFailedError: as ``step``.
        """
        command = copies(pairs)
        with self._stepping() as ranks:
            ranks.links.broadcast(command)
            ranks.own.copy_blocks(command.pairs)

    def on_failure(self, notify: Callable[[], None]) -> None:
        """Call ``notify``, on another thread, whenever a rank has failed."""
        self._notify = notify

    def restart(self) -> None:
        """Start all ranks anew; see ``PipelinedExecutor``."""
        self._end()
        try:
            self._ranks = self._start(self._failed, None)
        except RankFailedError:
            raise
        except FuserveError as error:
            raise RankFailedError(f"rank 0 cannot load its part: {error}") from error
        self.failure = None
        failure = self._ranks.group.failure
        if failure is not None:  # again, in between
            self.failure = _stopped(failure)

    def close(self) -> None:
        """End all ranks, and let go of weights and cache."""
        ranks = self._ranks
        if ranks is not None and ranks.group.failure is None:
            with suppress(OSError, RuntimeError):
                ranks.links.broadcast(Stop())
        self._end(leave_s=_LEAVE_S)

    @contextmanager
    def _stepping(self) -> Iterator[RunningRanks]:
        ranks = self._ranks
        if ranks is None or self.failure is not None:
            raise RankFailedError(str(self.failure or "The model's ranks have been ended."))
        try:
            with ranks.group.stepping():
                yield ranks
        except RankFailedError as error:
            raise _stopped(error) from error

    def _end(self, leave_s: float = 0.0) -> None:
        ranks, self._ranks = self._ranks, None
        self._begun.clear()
        if ranks is not None:
            ranks.close(leave_s=leave_s)

    def _failed(self, error: RankFailedError) -> None:
        self.failure = _stopped(error)
        self._notify()


def _stopped(error: RankFailedError) -> RankFailedError:
    return RankFailedError(
        f"The processes that run the model have stopped: {error}. They are being started again; "
        "send the request again."
    )
