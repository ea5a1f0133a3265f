"""Which tokens go into the next step. Pure policy over sequences and blocks; no I/O, no clock."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.engine.block_manager import BlockManager, blocks_for
from fuserve.engine.sequence import Chunk, Sequence, SequenceStatus

_by_rank = attrgetter("rank")


class Scheduler:
    """Decode first, then prompts in chunks, first come first served, under a token budget.

    When blocks run out, the newest sequences lose theirs and are computed again later, so the
    oldest always advances and none is failed. Every single sequence must fit into the cache
    alone; the engine refuses those that do not.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_logits: int | None = None,
    ) -> None:
        self._blocks = blocks
        # Every running sequence gets at least a token in every step.
        self._max_running = min(max_num_seqs, max_num_batched_tokens)
        self._token_budget = max_num_batched_tokens
        self._max_prompt_logits = max_prompt_logits or max_num_batched_tokens
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # by rank

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_by_rank)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._take_blocks(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; blocks for all their tokens are in the block tables."""
        chunks: list[Chunk] = []
        budget = self._token_budget
        preempted = False
        # Prompts have their blocks since they were admitted and decoding sequences come by rank, so
        # nobody takes blocks from a sequence that has a chunk in this step already.
        decoding_first = sorted(self._running, key=lambda sequence: sequence.num_pending > 1)
        for sequence in decoding_first:
            if sequence.status is not SequenceStatus.RUNNING or budget == 0:
                continue  # preempted by an older one, or no budget left for prompts
            num_tokens = min(sequence.num_pending, budget)
            preempted |= self._make_room(sequence, num_tokens)
            if sequence.status is SequenceStatus.RUNNING:
                drafts = self._drafts(sequence, budget - num_tokens)
                chunks.append(_chunk(sequence, num_tokens, drafts))
                budget -= chunks[-1].num_tokens
        if preempted:
            return chunks  # whoever lost blocks shall not take them back at once
        while budget > 0 and (admitted := self._admit_next()) is not None:
            num_tokens = min(admitted.num_pending, budget)
            chunks.append(_chunk(admitted, num_tokens))
            budget -= num_tokens
        return chunks

    def _drafts(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """What can be verified of a decoding sequence's drafts without taking from others."""
        drafts, sequence.draft_tokens = sequence.draft_tokens, []
        room = len(sequence.blocks) * BLOCK_SIZE_TOKENS - len(sequence.tokens)
        others = len(self._running)
        return tuple(drafts[: max(0, min(room, (budget - others) // 2))])

    def advance(self, chunks: list[Chunk]) -> None:
        """The step with these chunks has run: their keys and values are in the cache."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_known
            if sequence.followers and sequence.num_computed >= sequence.num_prompt_tokens:
                self._start_followers(sequence)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """The first drafts of the last chunk were right and are among the sequence's tokens."""
        sequence.num_computed += num_drafts

    def _start_followers(self, leader: Sequence) -> None:
        # The last prompt token is always computed again, because its logits are needed.
        num_shared = (leader.num_prompt_tokens - 1) // BLOCK_SIZE_TOKENS
        for follower in leader.followers:
            follower.blocks = self._blocks.share(leader.blocks[:num_shared])
            follower.num_computed = num_shared * BLOCK_SIZE_TOKENS
            self.add(follower)
        leader.followers = []

    def _admit_next(self) -> Sequence | None:
        """Start the first waiting sequence if all its tokens find room; else None."""
        if not self._waiting or len(self._running) >= self._max_running:
            return None
        sequence = self._waiting[0]
        num_missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while num_missing > self._blocks.num_free:
            if self._running:
                return None  # they will free blocks
            # What waiting followers share with a leader that has left is freed by nobody else.
            self._preempt(self._newest_holder())
            num_missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        sequence.blocks += self._blocks.allocate(num_missing)
        sequence.status = SequenceStatus.RUNNING
        del self._waiting[0]
        insort(self._running, sequence, key=_by_rank)
        return sequence

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend a running sequence's block table; return whether any sequence was preempted."""
        num_missing = blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        preempted = False
        while num_missing > self._blocks.num_free:
            victim = self._newest_holder()
            preempted |= victim.status is SequenceStatus.RUNNING
            self._preempt(victim)
            if victim is sequence:
                return preempted
        if num_missing > 0:
            sequence.blocks += self._blocks.allocate(num_missing)
        return preempted

    def _newest_holder(self) -> Sequence:
        """The newest sequence, running or waiting, that holds blocks."""
        holders = [sequence for sequence in self._waiting if sequence.blocks]
        return max(holders[-1:] + self._running[-1:], key=_by_rank)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self.add(sequence)
        self._take_blocks(sequence)
        sequence.num_preemptions += 1

    def _take_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0


def _chunk(sequence: Sequence, num_tokens: int, drafts: tuple[int, ...] = ()) -> Chunk:
    samples = num_tokens == sequence.num_pending and sequence.generates
    return Chunk(sequence, sequence.num_computed, num_tokens + len(drafts), samples, drafts)
