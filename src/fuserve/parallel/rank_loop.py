"""What a rank other than 0 does: what rank 0 says, until it says stop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch
from fuserve.parallel.commands import Copy, Step, Stop
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.links import WorkerLinks

Floats = npt.NDArray[np.float32]


class ShardExecutor(Protocol):
    """An executor of a part of a model."""

    def step(self, batch: StepBatch, hidden: Floats | None = None) -> Floats:
        """Run the part's layers; hidden states in between stages, logits in the end."""
        ...

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy KV-cache blocks of the part's layers."""
        ...

    def close(self) -> None:
        """Let go of weights, cache and threads."""
        ...


def run_rank(rank: int, layout: GroupLayout, executor: ShardExecutor, links: WorkerLinks) -> None:
    """Obey until told to stop. Raises EOFError when rank 0 has gone.

    Args:
        rank: this one.
        layout: of the group.
        executor: of this rank's part.
        links: to the other ranks.
    """
    stage = layout.stage(rank)
    is_first, is_last = stage == 0, stage == layout.num_stages - 1
    hands_on = layout.tensor_rank(rank) == 0
    while True:
        command = links.receive()
        if isinstance(command, Stop):
            return
        if isinstance(command, Copy):
            executor.copy_blocks(command.pairs)
        elif isinstance(command, Step):
            number, batch = command.number, command.batch
            hidden = None if is_first else links.receive_hidden(number, len(batch.tokens))
            output = executor.step(batch, hidden)
            if hands_on and not is_last:
                links.send_hidden(number, output)
            elif hands_on and not is_first:
                links.send_results(number, batch, output)
