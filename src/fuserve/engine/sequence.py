"""Sequence: what the scheduler knows of one row of tokens. Data only."""

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
        rank: (arrival, branch): the lower is served first and preempted last.
        tokens: prompt and output.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed: leading tokens whose keys and values are in the cache.
        blocks: the block table.
        reuses_prefix: whether cached blocks may stand for the beginning of the prompt; not where
            the results of all prompt tokens are read.
        followers: sequences of the same prompt, parked until this one's prompt is computed.
        num_preemptions: how often its blocks were taken away.
        draft_tokens: a guess of what follows ``tokens``, for the next step to verify.
        prompt_rows: results of the prompt that are read; None for most.
    """

    rank: tuple[int, int]
    tokens: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    reuses_prefix: bool = True
    status: SequenceStatus = SequenceStatus.PARKED
    followers: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0
    draft_tokens: list[int] = field(default_factory=list)
    prompt_rows: PromptRows | None = None

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while a prompt is being read."""
        return len(self.tokens) - self.num_computed

    @property
    def generates(self) -> bool:
        """Whether tokens are to follow; those of an embedding are only read."""
        return self.prompt_rows is None or self.prompt_rows.kind != "hidden"


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` of a sequence, to be computed in one step.

    Attributes:
        sequence: whose tokens.
        start: position of the first.
        num_tokens: drafts included.
        samples: the chunk reaches the sequence's last token, so its logits choose the next one.
        draft_tokens: guesses that follow the sequence's last token in this chunk. They do not
            count as computed until ``Scheduler.accept`` says so.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    draft_tokens: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Tokens that are the sequence's own, not guessed."""
        return self.num_tokens - len(self.draft_tokens)

    @property
    def logit_positions(self) -> range:
        """Positions whose logits are wanted: unread ones of the prompt, the last token, drafts."""
        end = self.start + self.num_known
        rows = self.sequence.prompt_rows
        wanted = range(end, end)
        if rows is not None and rows.kind == "logits":
            wanted = rows.within(self.start, end)
        if not self.samples:
            return wanted
        first = wanted.start if wanted else end - 1
        return range(first, self.start + self.num_tokens)

    @property
    def hidden_positions(self) -> range:
        """Positions whose hidden states are wanted."""
        rows = self.sequence.prompt_rows
        if rows is None or rows.kind != "hidden":
            return range(0)
        return rows.within(self.start, self.start + self.num_known)
