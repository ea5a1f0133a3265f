"""Exchange among the ranks of one host through memory that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import ExchangeError as ExchangeError
from fuserve.kernels.machine import selected_isa


def segment_bytes(size: int, floats: int) -> int:
    """Bytes of shared memory through which ``size`` ranks exchange parts of up to ``floats``.

    The memory must be zeros before the first rank uses it: new POSIX shared memory is.
    """
    return int(_native.exchange_segment_bytes(size, floats))


class SharedExchange:
    """One rank's end of memory that the ranks of one host share.

    All ranks do the same exchanges in the same order; each waits for the others by spinning, then
    yielding its core.

    Args:
        memory: the same ``segment_bytes(size, floats)`` in every rank, aligned to 64 bytes, zeros
            before the first rank's first exchange. Kept alive as long as this object.
        rank: this rank.
        size: how many ranks there are.
        floats: the largest part of one exchange.
        timeout_s: how long to wait for another rank.

    Raises:
        ValueError: the memory is too small or not aligned, or there is no such rank.
    """

    def __init__(
        self, memory: npt.NDArray[np.uint8], *, rank: int, size: int, floats: int, timeout_s: float
    ) -> None:
        self.rank = rank
        self.size = size
        self.floats = floats
        self.native = _native.SharedExchange(memory, rank, size, floats, timeout_s)

    def all_reduce(self, array: npt.NDArray[np.float32]) -> None:
        """Replace a contiguous array in place by its sum over the ranks, in one fixed order.

        Raises:
            ExchangeError: a rank did not come in time, or the group was aborted.
        """
        self.native.all_reduce(selected_isa(), array.reshape(-1))

    def all_gather(self, parts: Sequence[npt.NDArray[np.float32]]) -> None:
        """Bring every rank's part to all ranks.

        Args:
            parts: one contiguous array for each rank, of sizes that are the same in all ranks.
                ``parts[rank]`` is this rank's; the others are filled in.

        Raises:
            ExchangeError: a rank did not come in time, or the group was aborted.
            ValueError: there is not a part for each rank.
        """
        self.native.all_gather([part.reshape(-1) for part in parts])

    def abort(self) -> None:
        """Let all ranks' present and later exchanges fail at once. Any rank, any thread."""
        self.native.abort()
