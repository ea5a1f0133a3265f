from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.engine.block_manager import BlockManager, blocks_for
from fuserve.engine.scheduler import Scheduler
from fuserve.engine.sequence import Chunk, Sequence, SequenceStatus
from fuserve.errors import CapacityError

NUM_BLOCKS = 8


class Workload:
    """Drives a scheduler as the engine does, and checks its promises after every step."""

    def __init__(self, max_num_seqs: int, budget: int) -> None:
        self.blocks = BlockManager(NUM_BLOCKS)
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        self.alive: dict[Sequence, int] = {}  # and the tokens at which each ends
        self.arrivals = 0
        self.finished = 0

    def add(self, num_prompt: int, num_output: int, n: int) -> None:
        branches = [
            Sequence((self.arrivals, branch), [1] * num_prompt, num_prompt) for branch in range(n)
        ]
        self.arrivals += 1
        for sequence in branches:
            self.alive[sequence] = min(num_prompt + num_output, NUM_BLOCKS * BLOCK_SIZE_TOKENS)
        branches[0].followers = branches[1:]
        self.scheduler.add(branches[0])

    def abort(self, which: int) -> None:
        if self.alive:
            arrival = list(self.alive)[which % len(self.alive)].rank[0]
            for sequence in [s for s in self.alive if s.rank[0] == arrival]:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self.alive[sequence]
        self.finished += 1

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.check(chunks)
        self.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1)
                if len(chunk.sequence.tokens) >= self.alive[chunk.sequence]:
                    self.end(chunk.sequence)
        self.check_blocks()
        return chunks

    def check(self, chunks: list[Chunk]) -> None:
        assert sum(chunk.num_tokens for chunk in chunks) <= self.budget
        assert self.scheduler.num_running <= min(self.max_num_seqs, self.budget)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.num_tokens > 0
            assert chunk.start == chunk.sequence.num_computed
            assert len(chunk.sequence.blocks) >= blocks_for(chunk.start + chunk.num_tokens)
            last_block = chunk.sequence.blocks[chunk.start // BLOCK_SIZE_TOKENS :]
            assert all(self.blocks.references(block) == 1 for block in last_block), (
                "a block that will be written is shared"
            )
        self.check_blocks()

    def check_blocks(self) -> None:
        held = Counter(block for sequence in self.alive for block in sequence.blocks)
        assert all(self.blocks.references(block) == held[block] for block in range(NUM_BLOCKS)), (
            "reference counts differ from the block tables"
        )
        assert self.blocks.num_free == NUM_BLOCKS - len(held), "a block is leaked or owned twice"
        for sequence in self.alive:
            assert len(set(sequence.blocks)) == len(sequence.blocks)

    def drain(self) -> None:
        for _ in range(20_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "some sequence starves"
        assert self.blocks.num_free == NUM_BLOCKS
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


adds = st.tuples(
    st.just("add"),
    st.integers(1, NUM_BLOCKS * BLOCK_SIZE_TOKENS - 1),
    st.integers(1, 120),
    st.integers(1, 4),
)
operations = st.one_of(
    adds,
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 40)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 80), st.lists(operations, max_size=25))
def test_no_order_of_events_leaks_a_block_or_starves_a_request(
    max_num_seqs: int, budget: int, events: list[tuple[str, int]]
) -> None:
    work = Workload(max_num_seqs, budget)
    for kind, *numbers in events:
        if kind == "add":
            work.add(*numbers)
        elif kind == "abort":
            work.abort(*numbers)
            work.check_blocks()
        else:
            for _ in range(numbers[0]):
                work.step()
    work.drain()


def test_running_streams_come_before_a_long_prompt() -> None:
    work = Workload(max_num_seqs=4, budget=16)
    work.add(8, 50, n=1)
    work.step()
    work.add(100, 5, n=1)
    for _ in range(5):
        decoding, prompt = work.step()
        assert decoding.num_tokens == 1
        assert prompt.num_tokens == 15


def test_first_come_is_first_served() -> None:
    work = Workload(max_num_seqs=2, budget=64)
    for _ in range(4):
        work.add(10, 4, n=1)
    started = [chunk.sequence.rank[0] for _ in range(9) for chunk in work.step() if not chunk.start]
    assert started == [0, 1, 2, 3]


def test_when_blocks_run_out_the_newest_is_set_back_and_still_finishes() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(120, 100, n=1)
    work.add(120, 100, n=1)
    oldest, newest = list(work.alive)
    work.drain()
    assert oldest.num_preemptions == 0
    assert newest.num_preemptions > 0
    assert len(newest.tokens) == 220


def test_branches_share_the_full_blocks_of_their_prompt() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(70, 10, n=3)
    work.step()
    work.step()
    leader, second, third = work.alive
    assert leader.blocks[:2] == second.blocks[:2] == third.blocks[:2]
    assert len({leader.blocks[2], second.blocks[2], third.blocks[2]}) == 3
    assert work.blocks.num_free == NUM_BLOCKS - 5


def test_blocks_shared_by_waiting_branches_do_not_block_an_older_request() -> None:
    work = Workload(max_num_seqs=1, budget=256)
    work.add(200, 2, n=2)
    leader, follower = work.alive
    work.step()
    assert follower.status is SequenceStatus.WAITING and follower.blocks
    older = Sequence((-1, 0), [1] * 255, 255)  # as if it had been preempted before
    work.alive[older] = 256
    work.scheduler.add(older)
    work.drain()
    assert leader.status is follower.status is older.status is SequenceStatus.FINISHED


def test_a_block_manager_out_of_blocks_takes_nothing() -> None:
    blocks = BlockManager(3)
    blocks.allocate(2)
    with pytest.raises(CapacityError, match="2 KV-cache blocks asked, 1 free"):
        blocks.allocate(2)
    assert blocks.num_free == 1
