"""Communicator among ranks of several hosts, through ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from fuserve.decoder.communicator import tree_sum
from fuserve.kernels.exchange import SharedExchange

Floats = npt.NDArray[np.float32]


class TorchCommunicator:
    """See ``fuserve.decoder.communicator.Communicator``.

    Args:
        ranks: of the group that share the layers, in the order of their tensor ranks.
        group: of these ranks.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self._ranks = list(ranks)
        self._group = group
        self.rank = self._ranks.index(dist.get_rank())
        self.size = len(self._ranks)
        self.shared: SharedExchange | None = None

    def all_reduce(self, array: Floats) -> None:
        """Replace a contiguous ``array`` in place by its sum over the ranks.

        The parts are gathered and added here: how a library adds them depends on the number of
        ranks and on the size, and the tokens would too.
        """
        parts = [np.empty_like(array) for _ in self._ranks]
        dist.all_gather(
            [torch.from_numpy(part) for part in parts], torch.from_numpy(array), group=self._group
        )
        array[...] = tree_sum(parts)

    def gather(self, parts: Sequence[Floats]) -> None:
        """Bring every rank's part to rank 0."""
        leader = self._ranks[0]
        if self.rank != 0:
            dist.send(torch.from_numpy(parts[self.rank]), leader, group=self._group)
            return
        for source, part in zip(self._ranks[1:], parts[1:], strict=True):
            dist.recv(torch.from_numpy(part), source, group=self._group)

    def all_gather(self, parts: Sequence[Floats]) -> None:
        """Bring every rank's part to all ranks."""
        mine = torch.from_numpy(parts[self.rank])
        others = [(rank, part) for rank, part in zip(self._ranks, parts, strict=True)]
        del others[self.rank]
        work = [dist.isend(mine, rank, group=self._group) for rank, _ in others if len(mine)]
        work += [
            dist.irecv(torch.from_numpy(part), rank, group=self._group)
            for rank, part in others
            if len(part)
        ]
        for each in work:
            assert each is not None, "this rank is in the group"
            each.wait()
