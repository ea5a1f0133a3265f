"""Drives a scheduler as the engine does, over a cache of tokens, and checks every step."""

from __future__ import annotations

from collections import Counter, deque

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.engine.block_manager import BlockManager, blocks_for
from fuserve.engine.pace import Pace
from fuserve.engine.schedule import Schedule
from fuserve.engine.scheduler import Scheduler
from fuserve.engine.sequence import Chunk, Sequence, SequenceStatus

NUM_BLOCKS = 8
NEXT_TOKEN = 7


class Workload:
    """Sequences that all go on with the same token until they have their lengths.

    Steps are executed when they are scheduled, and their results are read when as many others are
    on their way as a pipeline would have.
    """

    def __init__(
        self,
        max_num_seqs: int,
        budget: int,
        *,
        num_blocks: int = NUM_BLOCKS,
        retain: bool = True,
        pace: Pace | None = None,
        num_in_flight: int = 1,
    ) -> None:
        self.num_blocks = num_blocks
        self.blocks = BlockManager(num_blocks, retain=retain)
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.num_in_flight = num_in_flight
        self.in_flight: deque[Schedule] = deque()
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            pace=pace,
            num_in_flight=num_in_flight,
        )
        self.alive: dict[Sequence, int] = {}  # and the tokens at which each ends
        self.arrivals = 0
        self.num_prompt_tokens_computed = 0
        self._cache: dict[tuple[int, int], int] = {}  # (block, slot): token

    def add(
        self,
        num_prompt: int,
        num_output: int,
        n: int = 1,
        *,
        text: int = 1,
        client: str = "",
        priority: int = 0,
    ) -> list[Sequence]:
        """A request; the prompts of one ``text`` are beginnings of each other."""
        branches = [
            Sequence(
                (priority, self.arrivals, branch), [text] * num_prompt, num_prompt, client=client
            )
            for branch in range(n)
        ]
        self.arrivals += 1
        for sequence in branches:
            longest = self.num_blocks * BLOCK_SIZE_TOKENS
            self.alive[sequence] = min(num_prompt + num_output, longest)
        branches[0].followers = branches[1:]
        self.scheduler.add(branches[0])
        return branches

    def abort(self, which: int, *, failed: bool = False) -> None:
        if self.alive:
            arrival = list(self.alive)[which % len(self.alive)].rank[1]
            for sequence in [s for s in self.alive if s.rank[1] == arrival]:
                self.end(sequence, failed=failed)

    def end(self, sequence: Sequence, *, failed: bool = False) -> None:
        self.scheduler.finish(sequence, failed=failed)
        del self.alive[sequence]

    def step(self, num_drafts: int = 0, num_right: int = 0) -> list[Chunk]:
        """One step; generating sequences bring guesses, of which the first few are right."""
        while len(self.in_flight) < self.num_in_flight:
            for sequence in self.alive:
                if sequence.num_pending == 1 and not sequence.in_flight:
                    wrong = [0] * max(0, num_drafts - num_right)
                    sequence.draft_tokens = [NEXT_TOKEN] * min(num_drafts, num_right) + wrong
            schedule = self.scheduler.schedule()
            self.check(schedule)
            if not schedule.chunks:
                break
            self.execute(schedule)
            self.in_flight.append(schedule)
        return self.finish(self.in_flight.popleft()) if self.in_flight else []

    def finish(self, schedule: Schedule) -> list[Chunk]:
        """Read the results of a step."""
        running = [c for c in schedule.chunks if c.sequence.status is SequenceStatus.RUNNING]
        self.scheduler.advance(running)
        for chunk in running:
            self.num_prompt_tokens_computed += max(
                0,
                min(chunk.sequence.num_prompt_tokens, chunk.start + chunk.num_tokens) - chunk.start,
            )
            if chunk.samples:
                self.sample(chunk)
        self.check_blocks()
        return schedule.chunks

    def sample(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        length = self.alive[sequence]
        num_right = 0
        for draft in chunk.draft_tokens:
            if draft != NEXT_TOKEN or len(sequence.tokens) + 1 >= length:
                break
            sequence.tokens.append(draft)
            num_right += 1
        self.scheduler.accept(sequence, num_right)
        sequence.tokens.append(NEXT_TOKEN)
        if len(sequence.tokens) >= length:
            self.end(sequence)

    def execute(self, schedule: Schedule) -> None:
        """Write the tokens into the cache, and read every sequence's history back."""
        for source, target in schedule.copies:
            for slot in range(BLOCK_SIZE_TOKENS):
                self._cache[target, slot] = self._cache.get((source, slot), -1)
        for chunk in schedule.chunks:
            end = chunk.start + chunk.num_tokens
            tokens = [*chunk.sequence.tokens[:end], *chunk.draft_tokens]
            places = [
                (chunk.sequence.blocks[i // BLOCK_SIZE_TOKENS], i % BLOCK_SIZE_TOKENS)
                for i in range(len(tokens))
            ]
            for position in range(chunk.start, len(tokens)):
                self._cache[places[position]] = tokens[position]
            assert [self._cache[place] for place in places] == tokens, "a block holds other tokens"

    def check(self, schedule: Schedule) -> None:
        chunks = schedule.chunks
        assert sum(chunk.num_step_tokens for chunk in chunks) <= self.budget
        assert self.scheduler.num_running <= min(self.max_num_seqs, self.budget)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        assert chunks or self.in_flight or not self.alive, "nothing runs although something waits"
        under_way = Counter(
            chunk.sequence for step in self.in_flight for chunk in step.chunks if chunk.samples
        )
        assert not any(under_way[chunk.sequence] for chunk in chunks), "its last token is not known"
        for chunk in chunks:
            assert chunk.num_tokens > 0
            if self.num_in_flight == 1:
                assert chunk.start == chunk.sequence.num_computed
            end = chunk.start + chunk.num_step_tokens
            assert len(chunk.sequence.blocks) >= blocks_for(end)
            written = chunk.sequence.blocks[chunk.start // BLOCK_SIZE_TOKENS :]
            assert all(self.blocks.references(block) == 1 for block in written), (
                "a block that will be written is shared"
            )
        self.check_blocks()

    def check_blocks(self) -> None:
        held = Counter(block for sequence in self.alive for block in sequence.blocks)
        assert all(
            self.blocks.references(block) == held[block] for block in range(self.num_blocks)
        ), "reference counts differ from the block tables"
        assert self.blocks.num_free == self.num_blocks - len(held), (
            "a block is leaked or owned twice"
        )
        for sequence in self.alive:
            assert len(set(sequence.blocks)) == len(sequence.blocks)

    def drain(self) -> None:
        for _ in range(20_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "some sequence starves"
        self.in_flight.clear()  # those that ended while they were under way
        assert self.blocks.num_free == self.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
