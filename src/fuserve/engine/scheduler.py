"""Which tokens go into the next step. Pure policy over sequences and blocks; no I/O, no clock."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.engine.block_manager import BlockManager, blocks_for
from fuserve.engine.fair_queue import FairQueue, FairShare
from fuserve.engine.pace import Pace, PrefillRoom
from fuserve.engine.prefix_hash import extend_hashes
from fuserve.engine.schedule import Schedule, decode_load, with_prefill
from fuserve.engine.sequence import Chunk, Sequence, SequenceStatus
from fuserve.engine.step_cost import StepCost, StepLoad

_by_rank = attrgetter("rank")


class Scheduler:
    """Decode first, then prompts in chunks, under a token budget and a pace.

    Prompts take turns by priority, then by what their clients have had, then first come first
    served. When blocks run out, the newest sequences lose theirs and are computed again later, so
    the oldest always advances and none is failed. Every single sequence must fit into the cache
    alone; the engine refuses those that do not.

    Waiting sequences hold no blocks. What they can share is found when they are admitted: a
    prefix in the cache by its hash, and the partly filled last block of a prompt that has several
    completions as a copy.

    Several steps may be on their way at once, one for each stage of a pipeline. Each takes its
    share of the running sequences, none of which has an earlier token under way; of a prompt, the
    next chunk may follow at once. Steps are executed in the order in which they were scheduled, so
    blocks of a sequence that ends while it is under way can be given to others in the next one.

    Attributes:
        num_preemptions: how often a sequence lost its blocks.
        num_prefix_queries: tokens of the sequences that were admitted.
        num_prefix_hits: how many of them were in the cache.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_logits: int | None = None,
        pace: Pace | None = None,
        num_in_flight: int = 1,
    ) -> None:
        self._blocks = blocks
        # Every running sequence gets at least a token in every step.
        self._max_running = min(max_num_seqs, max_num_batched_tokens)
        self._token_budget = max_num_batched_tokens
        self._max_prompt_logits = max_prompt_logits or max_num_batched_tokens
        self._pace = pace or Pace(StepCost())
        self._num_in_flight = num_in_flight
        self._last_decode_load = StepLoad()
        self._share = FairShare()
        self._waiting = FairQueue(self._share)
        self._running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._share.enter(sequence.client)
        self._wait(sequence)

    def finish(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Take a sequence out, wherever it is, and free its blocks.

        Args:
            sequence: any but a finished one.
            failed: what it has computed is not to be used by others.
        """
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        if sequence.status is not SequenceStatus.PARKED:
            self._share.leave(sequence.client)
        sequence.status = SequenceStatus.FINISHED
        sequence.leader = None
        self._take_blocks(sequence, forget=failed)

    def schedule(self) -> Schedule:
        """The next step; blocks for all its tokens are in the block tables."""
        decoding, preempted = self._make_room(self._ready())
        spare = self._token_budget - len(decoding)
        chunks: list[Chunk] = []
        # Guesses shall not keep prompts waiting.
        has_prompts = len(self._waiting) > 0 or any(s.num_pending > 1 for s in self._running)
        for_drafts = spare // 2 if has_prompts else spare
        for sequence in decoding:
            chunk = self._decode_chunk(sequence, for_drafts)
            for_drafts -= len(chunk.draft_tokens)
            spare -= len(chunk.draft_tokens)
            chunks.append(chunk)
        load = decode_load(chunks)
        copies: list[tuple[int, int]] = []
        # Whoever lost blocks shall not take them back at once.
        room = self._pace.room(self._felt_by(load))
        prompts = self._prefill(room, spare, copies, may_admit=not preempted)
        return Schedule(chunks + prompts, copies, with_prefill(load, prompts))

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """The step with these chunks has run: their keys and values are in the cache."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            self._share.charge(sequence.client, chunk.num_step_tokens)
            self._register(sequence)
            if sequence.followers and sequence.num_computed >= sequence.num_prompt_tokens:
                self._start_followers(sequence)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """The first drafts of the last chunk were right and are among the sequence's tokens."""
        sequence.num_computed += num_drafts
        sequence.num_issued += num_drafts

    def _ready(self) -> list[Sequence]:
        """Generating sequences that are not under way; a step's share of those that run."""
        share = -(-len(self._running) // self._num_in_flight)
        ready = [s for s in self._running if s.num_pending == 1 and not s.in_flight]
        return ready[:share]

    def _felt_by(self, load: StepLoad) -> StepLoad:
        """The decoding that prompts of this step would hold up: its own, or that of the others."""
        if load.num_decode_tokens > 0:
            self._last_decode_load = load
        elif any(s.in_flight and s.num_pending == 1 for s in self._running):
            return self._last_decode_load
        return load

    def _decode_chunk(self, sequence: Sequence, spare: int) -> Chunk:
        drafts: tuple[int, ...] = ()
        if sequence.draft_tokens:
            held = len(sequence.blocks) + self._blocks.num_free
            room = held * BLOCK_SIZE_TOKENS - len(sequence.tokens)
            drafts = tuple(sequence.draft_tokens[: max(0, min(spare, room))])
            sequence.draft_tokens = []
            self._extend(sequence, len(sequence.tokens) + len(drafts))
        return self._issue(sequence, 1, sequence.generates, drafts)

    def _issue(
        self, sequence: Sequence, num_tokens: int, samples: bool, drafts: tuple[int, ...] = ()
    ) -> Chunk:
        chunk = Chunk(sequence, sequence.num_issued, num_tokens, samples, drafts)
        sequence.num_issued += num_tokens
        return chunk

    def _prefill(
        self, room: PrefillRoom, budget: int, copies: list[tuple[int, int]], *, may_admit: bool
    ) -> list[Chunk]:
        """Chunks of prompts, each the next whose turn it is."""
        turn = self._share.turn
        unread = (s for s in self._running if s.num_pending > 1 and s.num_unissued > 0)
        reading = sorted(unread, key=turn, reverse=True)
        chunks: list[Chunk] = []
        num_logits = self._max_prompt_logits
        while budget > 0:
            waiting = self._waiting.first() if may_admit else None
            if waiting is not None and (not reading or turn(waiting) < turn(reading[-1])):
                may_admit = room.fits(len(waiting.tokens), 1) > 0 and self._admit(waiting, copies)
                if not may_admit:
                    continue
                sequence = waiting
            elif reading:
                sequence = reading.pop()
            else:
                break
            num_tokens = sequence.num_within(min(sequence.num_unissued, budget), num_logits)
            num_tokens = room.fits(sequence.num_issued, num_tokens)
            if num_tokens <= 0:
                break
            room.take(sequence.num_issued, num_tokens)
            budget -= num_tokens
            samples = num_tokens == sequence.num_unissued and sequence.generates
            chunk = self._issue(sequence, num_tokens, samples)
            num_logits -= len(chunk.logit_positions) - samples
            chunks.append(chunk)
        return chunks

    def _admit(self, sequence: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Start a waiting sequence if there is a seat and room for all its tokens."""
        if len(self._running) >= self._max_running:
            return False
        shared = self._cached_prefix(sequence)
        if shared is None:
            return False  # it would compute what another is just computing
        num_missing = blocks_for(len(sequence.tokens)) - len(shared)
        # Every running sequence may need a block soon, and would take it from this one.
        if (
            num_missing + len(self._running) > self._blocks.num_free_beside(shared)
            and self._running
        ):
            return False
        sequence.blocks = self._blocks.share(shared)
        self._extend(sequence, len(sequence.tokens))
        sequence.num_computed = len(shared) * BLOCK_SIZE_TOKENS
        sequence.num_registered = len(shared)
        self._copy_last_block(sequence, copies)
        sequence.num_issued = sequence.num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prefix_queries += len(sequence.tokens)
            self.num_prefix_hits += sequence.num_computed
        self._waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_by_rank)
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int] | None:
        """Blocks that hold the sequence's beginning; None if more of it is on its way."""
        num_full = sequence.num_reusable // BLOCK_SIZE_TOKENS
        extend_hashes(sequence.block_hashes, sequence.tokens, num_full, sequence.cache_salt)
        hashes = sequence.block_hashes[:num_full]
        found = self._blocks.find(hashes)
        if len(found) < num_full and self._is_being_computed(hashes[len(found)], len(found)):
            return None
        return found

    def _is_being_computed(self, content: bytes, index: int) -> bool:
        return any(
            index >= other.num_registered
            and index < len(other.block_hashes)
            and other.block_hashes[index] == content
            for other in self._running
            if other.num_pending > 1
        )

    def _copy_last_block(self, sequence: Sequence, copies: list[tuple[int, int]]) -> None:
        """Copy the part of a block that the prompt of several completions ends with."""
        leader, sequence.leader = sequence.leader, None
        num_common = sequence.num_prompt_tokens - 1
        if (
            leader is None
            or leader.num_computed < num_common
            or sequence.num_reusable < num_common
            or num_common - sequence.num_computed not in range(1, BLOCK_SIZE_TOKENS)
        ):
            return
        index = num_common // BLOCK_SIZE_TOKENS
        copies.append((leader.blocks[index], sequence.blocks[index]))
        sequence.num_computed = num_common

    def _start_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            if follower.status is SequenceStatus.PARKED:
                follower.leader = leader
                self.add(follower)
        leader.followers = []

    def _make_room(self, ready: list[Sequence]) -> tuple[list[Sequence], bool]:
        """A block for the next token of each, oldest first.

        Returns:
            Those that have one, and whether any sequence was preempted.
        """
        preempted = False
        late: list[Sequence] = []
        for sequence in ready:
            if sequence.num_computed < len(sequence.blocks) * BLOCK_SIZE_TOKENS:
                continue
            while self._blocks.num_free == 0 and sequence.status is SequenceStatus.RUNNING:
                newest = next(s for s in reversed(self._running) if not s.in_flight)
                if newest is sequence and any(s.in_flight for s in self._running):
                    late.append(sequence)  # the steps on their way may end with free blocks
                    break
                self._preempt(newest)
                preempted = True
            else:
                if sequence.status is SequenceStatus.RUNNING:
                    self._extend(sequence, len(sequence.tokens))
        running = [s for s in ready if s.status is SequenceStatus.RUNNING and s not in late]
        return running, preempted

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the block table hold so many tokens."""
        num_missing = blocks_for(num_tokens) - len(sequence.blocks)
        if num_missing > 0:
            sequence.blocks += self._blocks.allocate(num_missing)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._take_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self._waiting.add(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Let others find the blocks that have become full."""
        num_full = sequence.num_computed // BLOCK_SIZE_TOKENS
        if num_full <= sequence.num_registered:
            return
        hashes = sequence.block_hashes
        extend_hashes(hashes, sequence.tokens, num_full, sequence.cache_salt)
        for index in range(sequence.num_registered, num_full):
            self._blocks.register(sequence.blocks[index], hashes[index])
        sequence.num_registered = num_full

    def _take_blocks(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._register(sequence)
        self._blocks.release(sequence.blocks, forget=forget)
        sequence.blocks = []
        sequence.draft_tokens = []
        sequence.num_computed = 0
        sequence.num_issued = 0
        sequence.num_registered = 0
