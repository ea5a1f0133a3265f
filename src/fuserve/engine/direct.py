"""Steps without a scheduler: sequences that own a fixed run of KV-cache blocks.

Measurements (perplexity, latency) drive an executor themselves, so that what is measured is the
model's step and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import BLOCK_SIZE_TOKENS, StepBatch
from fuserve.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of the sequence in ``slot``, from position ``start``.

    ``logits_from``: offset into ``tokens`` of the first token whose logits are wanted; those of
    all later tokens of the chunk are wanted too. ``len(tokens)`` asks for none.
    """

    slot: int
    start: int
    tokens: npt.NDArray[np.int32]
    logits_from: int


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """``num_slots`` sequences of at most ``max_len`` tokens; slot s owns its own blocks."""

    num_slots: int
    max_len: int

    @property
    def blocks_per_slot(self) -> int:
        """Blocks that hold ``max_len`` tokens."""
        return -(-self.max_len // BLOCK_SIZE_TOKENS)

    def check_fits(self, num_blocks: int) -> None:
        """Raise CapacityError unless a cache of ``num_blocks`` holds all slots."""
        needed = self.num_slots * self.blocks_per_slot
        if needed > num_blocks:
            raise CapacityError(
                f"{self.num_slots} sequences of {self.max_len} tokens need {needed} KV-cache "
                f"blocks, the cache has {num_blocks}. Use fewer or shorter sequences."
            )

    def step_batch(self, chunks: Sequence[Chunk]) -> StepBatch:
        """One step over the chunks, each of another slot."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        first_blocks = np.array([chunk.slot for chunk in chunks]) * self.blocks_per_slot
        rows = [
            np.arange(begin + chunk.logits_from, end)
            for chunk, begin, end in zip(chunks, starts[:-1], starts[1:], strict=True)
        ]
        positions = [
            np.arange(chunk.start, chunk.start + length)
            for chunk, length in zip(chunks, lengths, strict=True)
        ]
        return StepBatch(
            tokens=np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            query_starts=starts,
            block_tables=(first_blocks[:, None] + np.arange(self.blocks_per_slot)).astype(np.int32),
            logit_rows=np.concatenate(rows).astype(np.int32),
        )
