"""Sequence: what the scheduler knows of one completion. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal


class SequenceStatus(Enum):
    """Where a sequence is.

    A parked one waits for the prompt of its leader to be computed, whose blocks it will share.
    """

    PARKED = "parked"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class PromptRows:
    """Results of prompt tokens that somebody reads, beside those that choose the next token.

    Attributes:
        kind: "logits" are read besides generating; "hidden" states instead of it.
        next: position of the first one that has not been read yet.
        end: position behind the last one.
    """

    kind: Literal["logits", "hidden"]
    next: int
    end: int

    def within(self, start: int, end: int) -> range:
        """Positions from ``start`` to ``end`` that are still to be read."""
        return range(max(start, self.next), min(end, self.end))


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
        num_issued: leading tokens that are there, or in steps that are on their way.
        blocks: the block table.
        block_hashes: content hashes of the leading full blocks, as far as anyone asked.
        num_registered: leading blocks that others can find by their hash.
        followers: sequences of the same prompt, parked until this one's prompt is computed.
        leader: of a follower, until it has its blocks.
        num_cached_tokens: tokens that were found in the cache when it first ran.
        num_preemptions: how often its blocks were taken away.
        prompt_rows: results of the prompt that are read; None for most.
    """

    rank: tuple[int, int, int]
    tokens: list[int]
    num_prompt_tokens: int
    client: str = ""
    cache_salt: bytes = b""
    draft_tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_issued: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    status: SequenceStatus = SequenceStatus.PARKED
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    prompt_rows: PromptRows | None = None

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while a prompt is being read."""
        return len(self.tokens) - self.num_computed

    @property
    def num_unissued(self) -> int:
        """Tokens that no step has taken."""
        return len(self.tokens) - self.num_issued

    @property
    def in_flight(self) -> bool:
        """Whether a step that holds some of its tokens has not ended."""
        return self.num_issued > self.num_computed

    @property
    def generates(self) -> bool:
        """Whether tokens are to follow; those of an embedding are only read."""
        return self.prompt_rows is None or self.prompt_rows.kind != "hidden"

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need not be computed if their keys and values are known.

        The last token always is, because its result is wanted, and so are all whose rows are read.
        """
        last = len(self.tokens) - 1
        rows = self.prompt_rows
        return last if rows is None or rows.next >= rows.end else min(rows.next, last)

    def num_within(self, num_tokens: int, num_logits: int) -> int:
        """How many of the next tokens want no more than so many rows of the prompt's logits."""
        rows = self.prompt_rows
        if rows is None or rows.kind != "logits":
            return num_tokens
        wanted = rows.within(self.num_issued, self.num_issued + num_tokens)
        if len(wanted) <= num_logits:
            return num_tokens
        return wanted.start - self.num_issued + num_logits


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` of a sequence, to be computed in one step.

    Attributes:
        start: position of the first.
        samples: the chunk ends with the sequence's last token, whose logits choose the next one.
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

    @property
    def logit_positions(self) -> range:
        """Positions whose logits are wanted: unread ones of the prompt, the last token, drafts."""
        end = self.start + self.num_tokens
        rows = self.sequence.prompt_rows
        wanted = range(end, end)
        if rows is not None and rows.kind == "logits":
            wanted = rows.within(self.start, end)
        if not self.samples:
            return wanted
        first = wanted.start if wanted else end - 1
        return range(first, self.start + self.num_step_tokens)

    @property
    def hidden_positions(self) -> range:
        """Positions whose hidden states are wanted."""
        rows = self.sequence.prompt_rows
        if rows is None or rows.kind != "hidden":
            return range(0)
        return rows.within(self.start, self.start + self.num_tokens)
