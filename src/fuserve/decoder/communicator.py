"""What the tensor-parallel ranks of a stage need of each other, whatever carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fuserve.decoder.shard import Shard
from fuserve.errors import InvalidRequestError
from fuserve.kernels.exchange import SharedExchange

Floats = npt.NDArray[np.float32]


class Communicator(Protocol):
    """Sums and gathers among the ranks that share a stage's layers.

    Attributes:
        rank: this rank, as ``Shard.tensor_rank``.
        size: how many ranks there are.
        shared: memory through which the ranks of one host exchange inside the native step; None
            where they are on several hosts. Then the step calls the methods below instead, on the
            thread that called it.
    """

    rank: int
    size: int
    shared: SharedExchange | None

    def all_reduce(self, array: Floats) -> None:
        """Replace a contiguous ``array`` in place by its sum over the ranks.

        Parts are added in the order of ``tree_sum``, so that all ranks, and native shared memory,
        get the same bits.

        Raises:
            FuserveError: a rank does not answer; the step ends with this error.
        """
        ...

    def gather(self, parts: Sequence[Floats]) -> None:
        """Bring every rank's part to rank 0.

        Args:
            parts: one contiguous array for each rank, of sizes that may differ but are the same in
                all ranks. ``parts[rank]`` is this rank's; in rank 0 the others are filled in. What
                becomes of the others in other ranks does not matter.

        Raises:
            FuserveError: a rank does not answer; the step ends with this error.
        """
        ...


def tree_sum(parts: Sequence[Floats]) -> Floats:
    """The sum of ranks' parts in the one order that is used everywhere: halves, recursively.

    ``(p0 + p1) + (p2 + p3)``; of an odd number, the first half has one more.
    """
    if len(parts) == 1:
        return parts[0]
    half = (len(parts) + 1) // 2
    return tree_sum(parts[:half]) + tree_sum(parts[half:])


def check_communicator(shard: Shard, communicator: Communicator | None) -> None:
    """Refuse a communicator that is not of the shard's rank, or that is missing.

    Raises:
        InvalidRequestError: they do not belong together.
    """
    rank, size = (0, 1) if communicator is None else (communicator.rank, communicator.size)
    if (rank, size) != (shard.tensor_rank, shard.tensor_size):
        raise InvalidRequestError(
            f"the shard is of rank {shard.tensor_rank} of {shard.tensor_size}, but the "
            f"communicator of rank {rank} of {size}"
        )
