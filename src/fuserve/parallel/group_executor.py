"""GroupExecutor: an executor whose model is spread over the processes of this host."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.architectures import DecoderSpec
from fuserve.checkpoints import Checkpoint
from fuserve.decoder.packing import Progress
from fuserve.decoder.step import StepBatch
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import FuserveError, RankFailedError
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.commands import Step, Stop, copies
from fuserve.parallel.identity import RankIdentity, check_identities, identity_of
from fuserve.parallel.links import LeaderLinks
from fuserve.parallel.local_communicator import LocalCommunicator
from fuserve.parallel.local_group import LocalGroup
from fuserve.parallel.options import ParallelOptions
from fuserve.parallel.placement import Cpus, place_ranks
from fuserve.parallel.rank_loop import ShardExecutor
from fuserve.parallel.rank_process import Message
from fuserve.parallel.shard_loading import CachePlan, ShardReport, load_shard
from fuserve.parallel.wiring import Wiring

_log = logging.getLogger("fuserve.parallel")
_LEAVE_S = 5.0

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Running:
    """The ranks while they run: a restart makes all of it anew."""

    group: LocalGroup
    links: LeaderLinks
    own: ShardExecutor
    communicator: LocalCommunicator | None


class GroupExecutor:
    """Rank 0 of a group: runs its own part of the model, and has the others run theirs.

    Args:
        checkpoint: the model's; None for dummy weights.
        weights: the model's, of which rank 0 reads its part.
        assignment: what all ranks are told.
        plan: of the KV cache.
        options: how long ranks may take.
        progress: called while rank 0 loads its part.

    Attributes:
        reports: what each rank holds.

    Raises:
        RankFailedError: a rank does not start, or has another model or version.
        CheckpointError, CapacityError: rank 0 cannot load its part.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        weights: DecoderWeights,
        assignment: Assignment,
        plan: CachePlan,
        options: ParallelOptions,
        progress: Progress | None = None,
    ) -> None:
        self.spec: DecoderSpec = weights.spec
        self.num_blocks = plan.num_blocks
        self.num_in_flight = assignment.layout.num_stages
        self.failure: RankFailedError | None = None
        self.reports: list[ShardReport] = []
        self._checkpoint = checkpoint
        self._weights = weights
        self._assignment = assignment
        self._plan = plan
        self._options = options
        self._notify: Callable[[], None] | None = None
        self._begun: deque[tuple[int, StepBatch, Floats]] = deque()
        self._num_steps = 0
        self._running: _Running | None = self._start(progress)

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks from 1 on."""
        running = self._running
        return [] if running is None else [p.process_id for p in running.group.processes]

    def step(self, batch: StepBatch) -> Floats:
        """Run all layers over the batch, alone; see ``Executor.step``.

        Raises:
            RankFailedError: a rank has died, hangs or cannot be reached.
        """
        assert not self._begun, "a step alone, but others are on their way"
        self.begin(batch)
        return self.finish()

    def begin(self, batch: StepBatch) -> None:
        """Start a step; see ``PipelinedExecutor``."""
        self._assignment.sizes.check(batch)
        number = self._num_steps
        self._num_steps += 1
        with self._stepping() as running:
            running.links.broadcast(Step(number, batch))
            output = running.own.step(batch)
            if self.num_in_flight > 1:
                running.links.send_hidden(number, output)
        self._begun.append((number, batch, output))

    def finish(self) -> Floats:
        """Results of the oldest step; see ``PipelinedExecutor``."""
        number, batch, output = self._begun.popleft()
        if self.num_in_flight == 1:
            return output
        with self._stepping() as running:
            logits, batch.hidden = running.links.receive_results(number, batch)
        return logits

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all ranks.

        Raises:
            RankFailedError: as ``step``.
        """
        command = copies(pairs)
        with self._stepping() as running:
            running.links.broadcast(command)
            running.own.copy_blocks(command.pairs)

    def on_failure(self, notify: Callable[[], None]) -> None:
        """Call ``notify``, on a thread of its own, when a rank has failed."""
        self._notify = notify

    def restart(self) -> None:
        """Start all ranks anew; see ``PipelinedExecutor``."""
        self._end()
        try:
            self._running = self._start(None)
        except RankFailedError:
            raise
        except FuserveError as error:
            raise RankFailedError(f"The model's ranks cannot be started again: {error}") from error
        self.failure = None
        failure = self._running.group.failure
        if failure is not None:  # again, in between
            self.failure = self._stopped(failure)

    def close(self) -> None:
        """End all ranks, and let go of weights and cache."""
        running = self._running
        if running is not None and running.group.failure is None:
            with suppress(OSError):
                running.links.broadcast(Stop())
        self._end(leave_s=_LEAVE_S)

    @contextmanager
    def _stepping(self) -> Iterator[_Running]:
        running = self._running
        if running is None or self.failure is not None:
            raise RankFailedError(str(self.failure or "The model's ranks have been ended."))
        try:
            with running.group.stepping():
                yield running
        except RankFailedError as error:
            raise self._stopped(error) from error

    def _start(self, progress: Progress | None) -> _Running:
        layout = self._assignment.layout
        wiring = Wiring(layout, self._assignment.sizes)
        places = place_ranks(layout.num_ranks)
        communicator = wiring.leader_communicator(self._assignment.step_timeout_s)

        def failed(error: RankFailedError) -> None:
            if communicator is not None and communicator.shared is not None:
                communicator.shared.abort()
            self.failure = self._stopped(error)
            if self._notify is not None:
                self._notify()

        try:
            group = LocalGroup(
                wiring.descriptors(),
                step_timeout_s=self._options.step_timeout_s,
                join_timeout_s=self._options.join_timeout_s,
                on_failure=failed,
            )
        finally:
            wiring.release()
        try:
            self._agree(group, wiring, places)
            with _on_cpus(places[0]):
                own = load_shard(
                    self._checkpoint,
                    self._weights,
                    self._assignment.options,
                    layout.shard(0),
                    self._plan,
                    communicator,
                    progress,
                )
            told = _told_by(progress)
            ready = group.hear("ready", told)
        except BaseException:
            group.close()
            raise
        self.reports = [
            ShardReport.of(own),
            *(ShardReport.from_json(message["report"]) for message in ready.values()),
        ]
        links = wiring.leader_links([process.control for process in group.processes])
        return _Running(group, links, own, communicator)

    def _agree(self, group: LocalGroup, wiring: Wiring, places: list[Cpus]) -> None:
        """Tell the ranks who they are, and see that they have the same model."""
        assignment = self._assignment.to_json()
        ranks = [process.rank for process in group.processes]
        group.tell(
            "assignment",
            {
                rank: {
                    "rank": rank,
                    "assignment": assignment,
                    "cpus": sorted(places[rank]),
                    "ends": wiring.ends(rank),
                }
                for rank in ranks
            },
        )
        hellos = group.hear("hello")
        own = identity_of(self._checkpoint, self._assignment.model, socket.gethostname())
        others = {rank: _identity(hello) for rank, hello in hellos.items()}
        check_identities({0: own, **others})
        group.tell("plan", {rank: {"plan": self._plan.to_json()} for rank in ranks})

    def _end(self, leave_s: float = 0.0) -> None:
        running, self._running = self._running, None
        self._begun.clear()
        if running is not None:
            running.group.close(leave_s=leave_s)
            running.own.close()

    def _stopped(self, error: RankFailedError) -> RankFailedError:
        return RankFailedError(
            f"The processes that run the model have stopped: {error} They are started again; send "
            "the request again."
        )


def _identity(hello: Message) -> RankIdentity:
    return RankIdentity(hello["version"], hello["model_digest"], hello["where"])


def _told_by(progress: Progress | None) -> Callable[[Message], None] | None:
    if progress is None:
        return None
    return lambda message: progress(message["stage"], message["done"], message["total"])


@contextmanager
def _on_cpus(cpus: Cpus) -> Iterator[None]:
    """Threads that are started in the block stay on these CPUs; the calling one does not."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
