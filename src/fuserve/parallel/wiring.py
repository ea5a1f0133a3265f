"""Wiring: the shared memory and the pipes among the ranks of one host."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from fuserve.kernels.exchange import segment_bytes
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from fuserve.parallel.local_links import HiddenSender, LocalLeaderLinks
from fuserve.parallel.segment import Bytes, Segment
from fuserve.parallel.slots import SlotSizes


class Wiring:
    """Made by rank 0 before the other ranks start; they inherit their ends of it.

    Within a stage there is memory to exchange in. From each stage to the next there is memory for
    hidden states, written by the first rank of the one, and a pipe to each rank of the other. From
    the last stage to rank 0 there are memory and a pipe for the results.

    Args:
        layout: of the group.
        sizes: of what goes from stage to stage.
    """

    def __init__(self, layout: GroupLayout, sizes: SlotSizes) -> None:
        self._layout = layout
        self._sizes = sizes
        # What each rank inherits, and how it is told of it.
        self._ends: dict[int, dict[str, Any]] = {rank: {} for rank in range(layout.num_ranks)}
        self._inherited: dict[int, list[int]] = {rank: [] for rank in range(layout.num_ranks)}
        self._to_release: list[Callable[[], None]] = []
        self._own_ends: list[Connection] = []
        self._exchange: Bytes | None = None
        self._next_stage: HiddenSender | None = None
        self._results: tuple[Connection, Bytes] | None = None
        for stage in range(layout.num_stages):
            if layout.tensor_size > 1:
                self._join_stage(stage)
            if stage > 0:
                self._join_to_next(stage - 1)
        if layout.num_stages > 1:
            self._join_results()

    def ends(self, rank: int) -> dict[str, Any]:
        """Descriptors of a rank's pipes and memory, by their use."""
        return self._ends[rank]

    def descriptors(self) -> dict[int, list[int]]:
        """What each rank but 0 inherits."""
        return {rank: fds for rank, fds in self._inherited.items() if rank != 0}

    def release(self) -> None:
        """Close what belongs to the other ranks, once they have been started.

        Only then does a pipe end when the process at its other end dies.
        """
        for release in self._to_release:
            release()
        self._to_release.clear()

    def close(self) -> None:
        """Close what belongs to rank 0 as well: its links end with it."""
        self.release()
        for end in self._own_ends:
            end.close()
        self._exchange = self._next_stage = self._results = None

    def leader_links(self, controls: list[Connection]) -> LocalLeaderLinks:
        """Rank 0's links."""
        return LocalLeaderLinks(controls, self._sizes, self._next_stage, self._results)

    def leader_communicator(self, timeout_s: float) -> LocalCommunicator | None:
        """Rank 0's communicator; None where no ranks share layers."""
        if self._exchange is None:
            return None
        return LocalCommunicator(self._exchange, 0, self._layout.tensor_size, timeout_s)

    def _segment(self, num_bytes: int) -> Segment:
        segment = Segment.create(num_bytes)
        self._to_release.append(segment.close)
        return segment

    def _end(self, rank: int, end: Connection) -> int:
        """Give an end of a pipe to a rank; it is told the descriptor."""
        if rank != 0:
            self._inherited[rank].append(end.fileno())
            self._to_release.append(end.close)
        else:
            self._own_ends.append(end)
        return end.fileno()

    def _memory(self, rank: int, segment: Segment) -> int:
        if rank != 0:
            self._inherited[rank].append(segment.descriptor)
        return segment.descriptor

    def _join_stage(self, stage: int) -> None:
        segment = self._segment(segment_bytes(self._layout.tensor_size, EXCHANGE_FLOATS))
        for rank in self._layout.ranks_of(stage):
            descriptor = self._memory(rank, segment)
            self._ends[rank]["exchange"] = [descriptor, segment.num_bytes]
        if stage == 0:
            self._exchange = segment.memory

    def _join_to_next(self, stage: int) -> None:
        segment = self._segment(self._sizes.hidden_bytes)
        sender = self._layout.rank(stage, 0)
        pipes: list[Connection] = []
        for rank in self._layout.ranks_of(stage + 1):
            ours, theirs = Pipe(duplex=False)
            pipes.append(theirs)
            self._ends[rank]["hidden_in"] = [
                self._end(rank, ours),
                self._memory(rank, segment),
            ]
        if sender == 0:
            self._next_stage = HiddenSender(pipes, segment.memory, self._sizes)
        self._ends[sender]["hidden_out"] = [
            [self._end(sender, pipe) for pipe in pipes],
            self._memory(sender, segment),
        ]

    def _join_results(self) -> None:
        segment = self._segment(self._sizes.result_bytes)
        ours, theirs = Pipe(duplex=False)
        rank = self._layout.last_leader
        self._ends[rank]["results"] = [self._end(rank, theirs), self._memory(rank, segment)]
        self._end(0, ours)
        self._results = ours, segment.memory
