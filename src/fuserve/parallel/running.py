"""The ranks of a group while they run, as rank 0 holds them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from fuserve.decoder.packing import Progress
from fuserve.errors import RankFailedError
from fuserve.parallel.links import LeaderLinks
from fuserve.parallel.rank_loop import ShardExecutor
from fuserve.parallel.shard_loading import ShardReport


class RankGroup(Protocol):
    """The other ranks, watched over.

    Attributes:
        failure: why they have ended; None while they run.
    """

    failure: RankFailedError | None

    @property
    def process_ids(self) -> list[int]:
        """The processes that rank 0 has started."""
        ...

    def stepping(self) -> AbstractContextManager[None]:
        """A part of a step. It fails, with RankFailedError, if anything goes wrong in it."""
        ...

    def close(self, *, leave_s: float = 0.0) -> None:
        """End them; those that were told to stop have ``leave_s`` to do so."""
        ...


@dataclass(slots=True)
class RunningRanks:
    """All that a restart makes anew.

    Attributes:
        group: the other ranks.
        links: to them.
        own: rank 0's part of the model.
        reports: what each rank holds, rank 0 first.
        resources: what is given back when all have ended; rank 0's part is in it.
    """

    group: RankGroup
    links: LeaderLinks
    own: ShardExecutor
    reports: list[ShardReport]
    resources: ExitStack

    def close(self, *, leave_s: float = 0.0) -> None:
        """End the ranks, see ``RankGroup.close``, and give back what this process has of them.

        Nothing waits for the garbage collector, nor for somebody to let go of an error.
        """
        self.group.close(leave_s=leave_s)
        self.resources.close()


class StartRanks(Protocol):
    """Starts the ranks: processes of this host, or those that ``torchrun`` has started."""

    def __call__(
        self, on_failure: Callable[[RankFailedError], None], progress: Progress | None
    ) -> RunningRanks:
        """Start all of them.

        Args:
            on_failure: called on another thread, once, when a rank has failed and all have ended.
            progress: called while parts are loaded.

        Raises:
            RankFailedError: a rank does not start, or has another model or version.
            CheckpointError, CapacityError: rank 0 cannot load its part.
        """
        ...
