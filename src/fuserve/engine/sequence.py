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
        rank: (priority, arrival, branch): of two, the lower is served first and preempted last.
        tokens: prompt and output.
        num_prompt_tokens: how many of them are the prompt's.
        client: who asked; clients of one priority share the machine evenly.
        cache_salt: sequences share cached blocks only with those of the same salt.
        draft_tokens: guesses of the tokens after the last one. The next step takes them along if
            budget and blocks allow, and forgets them otherwise.
        num_computed: leading tokens whose keys and values are in the cache.
        blocks: the block table.
        block_hashes: content hashes of the leading full blocks, as far as anyone asked.
        num_registered: leading blocks that others can find by their hash.
        followers: sequences of the same prompt, parked until this one's prompt is computed.
        leader: of a follower, until it has its blocks.
        num_cached_tokens: tokens that were found in the cache when it first ran.
        num_preemptions: how often its blocks were taken away.
    """

    rank: tuple[int, int, int]
    tokens: list[int]
    num_prompt_tokens: int
    client: str = ""
    cache_salt: bytes = b""
    draft_tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    status: SequenceStatus = SequenceStatus.PARKED
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    num_cached_tokens: int | None = None
    num_preemptions: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while a prompt is being read."""
        return len(self.tokens) - self.num_computed

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need not be computed if their keys and values are known.

        The last token always is, because its result is wanted.
        """
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` of a sequence, to be computed in one step.

    Attributes:
        start: position of the first.
        samples: the chunk ends with the sequence's last token, so its logits choose the next one.
        draft_tokens: computed behind them; each counts only if those before it prove right.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    draft_tokens: tuple[int, ...] = ()

    @property
    def num_step_tokens(self) -> int:
        """Tokens that the step computes for it, drafts included."""
        return self.num_tokens + len(self.draft_tokens)
