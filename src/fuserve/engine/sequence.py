"""Sequence: what the scheduler knows of one completion. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class SequenceStatus(Enum):
    """Where a sequence is.

    A parked one waits for the prompt of its leader to be computed, whose blocks it will share.
    """

    PARKED = "parked"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One row of tokens in the KV cache.

    Attributes:
        rank: (arrival, branch): the lower is served first and preempted last.
        tokens: prompt and output.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed: leading tokens whose keys and values are in the cache.
        blocks: the block table.
        followers: sequences of the same prompt, parked until this one's prompt is computed.
        num_preemptions: how often its blocks were taken away.
    """

    rank: tuple[int, int]
    tokens: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.PARKED
    followers: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while a prompt is being read."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` of a sequence, to be computed in one step.

    ``start``: position of the first. ``samples``: the chunk ends with the sequence's last token,
    so its logits choose the next one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
