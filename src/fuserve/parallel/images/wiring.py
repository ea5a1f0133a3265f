"""The shared memory among the ranks of one host that denoise together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuserve.kernels.exchange import segment_bytes
from fuserve.parallel.images.options import ImageParallelOptions
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from fuserve.parallel.segment import Segment

BANDS, HALVES = "bands", "halves"
"""What ranks exchange: what their bands need of each other, and the halves of guidance."""


class ImageWiring:
    """Made by rank 0 before the other ranks start; they inherit the descriptors.

    Args:
        options: who does what.
    """

    def __init__(self, options: ImageParallelOptions) -> None:
        self._options = options
        self._segments: list[Segment] = []
        self._memory: dict[tuple[str, int], tuple[Segment, list[int]]] = {}
        self._add(BANDS, options.band_groups())
        self._add(HALVES, options.half_groups())

    def descriptors(self) -> dict[int, list[int]]:
        """What each rank but 0 inherits."""
        inherited: dict[int, list[int]] = {rank: [] for rank in range(1, self._options.num_ranks)}
        for (_, rank), (segment, _) in self._memory.items():
            if rank != 0:
                inherited[rank].append(segment.descriptor)
        return inherited

    def ends(self, rank: int) -> dict[str, Any]:
        """Descriptor, size and ranks of each memory that a rank has, by its use."""
        return {
            use: [segment.descriptor, segment.num_bytes, ranks]
            for (use, owner), (segment, ranks) in self._memory.items()
            if owner == rank
        }

    def communicator(self, use: str) -> LocalCommunicator | None:
        """Rank 0's; None where no ranks exchange this."""
        if (use, 0) not in self._memory:
            return None
        segment, ranks = self._memory[use, 0]
        return LocalCommunicator(segment.memory, 0, len(ranks), self._options.step_timeout_s)

    def release(self) -> None:
        """Close the descriptors, once the ranks have been started; memory in use stays."""
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        self._memory.clear()

    def _add(self, use: str, groups: Sequence[list[int]]) -> None:
        for ranks in groups:
            if len(ranks) == 1:
                continue
            segment = Segment.create(segment_bytes(len(ranks), EXCHANGE_FLOATS))
            self._segments.append(segment)
            for rank in ranks:
                self._memory[use, rank] = segment, ranks


def joined(ends: dict[str, Any], use: str, rank: int, timeout_s: float) -> LocalCommunicator | None:
    """Another rank's communicator, of what it was told of its ends."""
    if use not in ends:
        return None
    descriptor, num_bytes, ranks = ends[use]
    memory = Segment(descriptor, num_bytes).memory
    return LocalCommunicator(memory, ranks.index(rank), len(ranks), timeout_s)
