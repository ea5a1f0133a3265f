from __future__ import annotations

import pytest

from fuserve.engine.block_manager import BlockManager
from fuserve.engine.sequence import SequenceStatus
from fuserve.errors import CapacityError
from tests.engine.workload import NUM_BLOCKS, Workload


def test_running_streams_come_before_a_long_prompt() -> None:
    work = Workload(max_num_seqs=4, budget=16)
    work.add(8, 50)
    work.step()
    work.add(100, 5, text=2)
    for _ in range(5):
        decoding, prompt = work.step()
        assert decoding.num_tokens == 1
        assert prompt.num_tokens == 15


def test_first_come_is_first_served() -> None:
    work = Workload(max_num_seqs=2, budget=64)
    for _ in range(4):
        work.add(10, 4)
    started = [chunk.sequence.rank[1] for _ in range(9) for chunk in work.step() if not chunk.start]
    assert started == [0, 1, 2, 3]


def test_a_lower_priority_number_is_served_first() -> None:
    work = Workload(max_num_seqs=1, budget=64)
    late = [work.add(10, 2, priority=priority)[0] for priority in (2, 1, 0, 1)]
    started = [chunk.sequence for _ in range(9) for chunk in work.step() if not chunk.start]
    assert started == [late[2], late[1], late[3], late[0]]


def test_a_client_with_one_request_does_not_wait_for_all_of_a_clients_many() -> None:
    work = Workload(max_num_seqs=1, budget=64)
    for _ in range(6):
        work.add(10, 4, client="many")
    for _ in range(3):
        work.step()
    (single,) = work.add(10, 4, client="one")
    started = [chunk.sequence for _ in range(9) for chunk in work.step() if not chunk.start]
    assert started.index(single) <= 1


def test_a_clients_short_prompt_comes_between_the_chunks_of_anothers_long_one() -> None:
    work = Workload(max_num_seqs=4, budget=32, num_blocks=16)
    work.add(200, 2, client="long")
    work.step()
    (short,) = work.add(20, 2, text=2, client="short")
    work.step()
    work.step()
    assert len(short.tokens) > 20


def test_an_idle_client_saves_up_no_claim() -> None:
    work = Workload(max_num_seqs=1, budget=64)
    work.add(10, 1, client="idle")
    work.step()
    for _ in range(3):
        work.add(10, 30, client="busy")
    for _ in range(40):
        work.step()
    late = [work.add(10, 30, client="idle")[0] for _ in range(3)]
    started = [chunk.sequence for _ in range(150) for chunk in work.step() if not chunk.start]
    assert [sequence in late for sequence in started[:3]] != [True, True, True]


def test_when_blocks_run_out_the_newest_is_set_back_and_still_finishes() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(90, 130)
    work.add(90, 130, text=2)
    oldest, newest = list(work.alive)
    work.drain()
    assert oldest.num_preemptions == 0
    assert newest.num_preemptions > 0
    assert len(newest.tokens) == 220


def test_branches_share_the_full_blocks_of_their_prompt_and_copy_the_last() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    leader, second, third = work.add(70, 10, n=3)
    work.step()
    chunks = work.step()
    assert [chunk.num_tokens for chunk in chunks] == [1, 1, 1]
    assert leader.blocks[:2] == second.blocks[:2] == third.blocks[:2]
    assert len({leader.blocks[2], second.blocks[2], third.blocks[2]}) == 3
    assert work.blocks.num_free == NUM_BLOCKS - 5
    assert work.num_prompt_tokens_computed == 70 + 2


def test_a_prompt_that_ends_with_a_block_is_copied_too_because_its_last_token_runs_again() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(64, 10, n=3)
    work.step()
    chunks = work.step()
    assert [chunk.num_tokens for chunk in chunks] == [1, 1, 1]


def test_waiting_branches_hold_no_blocks() -> None:
    work = Workload(max_num_seqs=1, budget=256)
    leader, follower = work.add(200, 2, n=2)
    work.step()
    assert follower.status is SequenceStatus.WAITING and not follower.blocks
    work.drain()
    assert leader.status is follower.status is SequenceStatus.FINISHED


def test_a_prompt_that_another_is_computing_waits_and_then_shares() -> None:
    work = Workload(max_num_seqs=4, budget=64)
    work.add(130, 4)
    second, third = work.add(130, 4)[0], work.add(140, 4)[0]
    work.drain()
    assert (second.num_cached_tokens, third.num_cached_tokens) == (128, 128)
    assert work.num_prompt_tokens_computed == 130 + 2 + 12


def test_a_set_back_sequence_finds_its_own_blocks_again() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(90, 70)
    (newest,) = work.add(90, 130, text=2)
    work.drain()
    assert newest.num_preemptions > 0
    assert work.num_prompt_tokens_computed < 90 + 90 + 90


def test_without_retention_nothing_is_found_after_the_end() -> None:
    work = Workload(max_num_seqs=4, budget=256, retain=False)
    work.add(100, 4)
    work.drain()
    (second,) = work.add(100, 4)
    work.drain()
    assert second.num_cached_tokens == 0


def test_what_a_failed_sequence_computed_is_used_by_nobody() -> None:
    work = Workload(max_num_seqs=4, budget=256)
    work.add(100, 4)
    work.step()
    work.abort(0, failed=True)
    (second,) = work.add(100, 4)
    work.drain()
    assert second.num_cached_tokens == 0


def test_drafts_are_dropped_when_budget_or_blocks_are_short() -> None:
    work = Workload(max_num_seqs=2, budget=6, num_blocks=2)
    work.add(5, 50)
    work.step()
    assert [chunk.draft_tokens for chunk in work.step(8, 8)] == [(7,) * 5]
    while work.alive:
        (chunk,) = work.step(4, 0)
    assert chunk.start + chunk.num_step_tokens <= 64


def test_a_block_manager_out_of_blocks_takes_nothing() -> None:
    blocks = BlockManager(3)
    blocks.allocate(2)
    with pytest.raises(CapacityError, match="2 KV-cache blocks asked, 1 free"):
        blocks.allocate(2)
    assert blocks.num_free == 1


def test_the_contents_let_go_first_are_given_away_first_and_of_a_prefix_its_end() -> None:
    blocks = BlockManager(4)
    for name in (b"a", b"b"):
        table = blocks.allocate(2)
        for index, block in enumerate(table):
            blocks.register(block, name + bytes([index]))
        blocks.release(table)
    assert blocks.num_free == blocks.num_retained == 4
    blocks.allocate(1)
    assert len(blocks.find([b"a\0", b"a\1"])) == 1
    blocks.allocate(1)
    assert blocks.find([b"a\0"]) == []
    assert len(blocks.find([b"b\0", b"b\1"])) == 2


def test_a_fresh_cache_is_used_from_its_beginning_and_freed_blocks_come_back_first() -> None:
    blocks = BlockManager(100, retain=False)
    first = blocks.allocate(3)
    assert first == [0, 1, 2]
    blocks.release(first)
    assert set(blocks.allocate(4)) == {0, 1, 2, 3}
