"""Communicator among the ranks of one host, through memory that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuserve.kernels.exchange import SharedExchange
from fuserve.parallel.segment import Bytes

Floats = npt.NDArray[np.float32]

EXCHANGE_FLOATS = 1 << 18
"""Floats that one exchange carries; larger arrays go in several. A megabyte stays in the caches."""


class LocalCommunicator:
    """See ``fuserve.decoder.communicator.Communicator``.

    Args:
        memory: of ``segment_bytes(size, EXCHANGE_FLOATS)``, zeros at first.
        rank: this one, among those that share the layers.
        size: how many share them.
        timeout_s: how long to wait for another rank.
    """

    def __init__(self, memory: Bytes, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.shared: SharedExchange | None = SharedExchange(
            memory, rank=rank, size=size, floats=EXCHANGE_FLOATS, timeout_s=timeout_s
        )

    def all_reduce(self, array: Floats) -> None:
        """Replace a contiguous ``array`` in place by its sum over the ranks."""
        assert self.shared is not None, "the communicator is closed"
        self.shared.all_reduce(array)

    def abort(self) -> None:
        """Let all ranks' present and later exchanges fail at once. For any thread."""
        assert self.shared is not None, "the communicator is closed"
        self.shared.abort()

    def close(self) -> None:
        """Let go of the memory, when no executor uses it any more."""
        self.shared = None

    def gather(self, parts: Sequence[Floats]) -> None:
        """Bring every rank's part to rank 0: through shared memory, to all ranks."""
        self.all_gather(parts)

    def all_gather(self, parts: Sequence[Floats]) -> None:
        """Bring every rank's part to all ranks."""
        assert self.shared is not None, "the communicator is closed"
        self.shared.all_gather(parts)
