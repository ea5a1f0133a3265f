"""The parts of a group, each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.step import StepBatch
from fuserve.errors import CapacityError, InvalidRequestError, RankFailedError
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.balance import balanced_stages
from fuserve.parallel.commands import Copy, Step, Stop, copies, decode, encode
from fuserve.parallel.identity import RankIdentity, check_identities
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.options import ParallelOptions
from fuserve.parallel.placement import parse_cpus, place_ranks
from fuserve.parallel.slots import SlotSizes


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_the_heaviest_stage_is_as_light_as_can_be(case: tuple[list[int], int]) -> None:
    costs, num_stages = case
    stages = balanced_stages(costs, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    assert len(stages) == num_stages and all(stages)

    def lightest(first: int, left: int) -> int:
        if left == 1:
            return sum(costs[first:])
        ends = range(first + 1, len(costs) - left + 2)
        return min(max(sum(costs[first:end]), lightest(end, left - 1)) for end in ends)

    assert max(sum(costs[i] for i in stage) for stage in stages) == lightest(0, num_stages)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="more than the model's 3 layers"):
        balanced_stages([1, 1, 1], 4)


def test_a_stage_with_the_head_has_fewer_layers() -> None:
    assert balanced_stages([1.0] * 9 + [5.0], 2) == (range(7), range(7, 10))


def test_ranks_that_share_layers_are_neighbours() -> None:
    layout = GroupLayout(2, (range(3), range(3, 7)))
    shards = [layout.shard(rank) for rank in range(layout.num_ranks)]
    assert [(s.tensor_rank, s.first_layer, s.end_layer) for s in shards] == [
        (0, 0, 3),
        (1, 0, 3),
        (0, 3, 7),
        (1, 3, 7),
    ]
    assert layout.last_leader == 2


def batch(num_tokens: int = 5, num_hidden: int = 1) -> StepBatch:
    return StepBatch(
        tokens=np.arange(num_tokens, dtype=np.int32) * 1000,
        positions=np.arange(num_tokens, dtype=np.int32),
        query_starts=np.array([0, 2, num_tokens], np.int32),
        block_tables=np.array([[3, -1, 7], [9, 8, -1]], np.int32),
        logit_rows=np.array([1, 4], np.int32),
        hidden_rows=np.arange(num_hidden, dtype=np.int32),
    )


@pytest.mark.parametrize("num_hidden", [0, 2])
def test_commands_arrive_as_they_were_sent(num_hidden: int) -> None:
    sent = batch(num_hidden=num_hidden)
    received = decode(encode(Step(7, sent)))
    assert isinstance(received, Step) and received.number == 7
    for name in ("tokens", "positions", "query_starts", "block_tables", "logit_rows"):
        assert np.array_equal(getattr(received.batch, name), getattr(sent, name))
    assert np.array_equal(received.batch.hidden_rows, sent.hidden_rows)
    assert decode(encode(copies([(1, 2), (3, 4)]))) == Copy(((1, 2), (3, 4)))
    assert decode(encode(Stop())) == Stop()


def test_a_command_that_was_cut_off_is_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        decode(encode(Step(7, batch()))[:-1])


def test_assignments_survive_json() -> None:
    assignment = Assignment(
        "demo",
        ExecutorOptions(quantize_layers=("*.o=keep",), num_threads=2),
        GroupLayout(2, (range(3), range(3, 7))),
        SlotSizes(512, 64, 257, 3),
        30.0,
    )
    assert Assignment.from_json(assignment.to_json()) == assignment


def test_a_step_that_does_not_fit_its_slot_is_refused() -> None:
    sizes = SlotSizes(max_tokens=4, hidden_size=8, vocab_size=16, num_slots=2)
    with pytest.raises(CapacityError, match="5 tokens"):
        sizes.check(batch())


def test_slots_do_not_overlap() -> None:
    sizes = SlotSizes(max_tokens=6, hidden_size=8, vocab_size=16, num_slots=3)
    memory = np.zeros(sizes.result_bytes, np.uint8)
    for number in range(3):
        logits, hidden = sizes.results(memory, number, batch())
        assert logits.shape == (2, 16) and hidden.shape == (1, 8)
        logits[:], hidden[:] = number + 1, -number - 1
    for number in range(3):
        logits, hidden = sizes.results(memory, number, batch())
        assert (logits == number + 1).all() and (hidden == -number - 1).all()


def test_a_rank_with_another_model_or_version_is_named() -> None:
    same = [RankIdentity("1.0", "aa", f"host{n}:/m") for n in range(3)]
    check_identities(dict(enumerate(same)))
    other = RankIdentity("1.0", "bb", "host3:/m")
    with pytest.raises(RankFailedError, match=r"rank 3 \(host3:/m\) has model files bb"):
        check_identities({**dict(enumerate(same)), 3: other})
    old = RankIdentity("0.9", "aa", "host1:/m")
    with pytest.raises(RankFailedError, match=r"rank 1 .* has fuserve 0.9.*same version"):
        check_identities({0: same[0], 1: old})
    with pytest.raises(RankFailedError, match="rank 0"):
        check_identities({0: other, 1: same[1], 2: same[2]})


def machine(folder: Path, nodes: list[str], siblings: list[str]) -> Path:
    for number, cpus in enumerate(nodes):
        (folder / f"node/node{number}").mkdir(parents=True)
        (folder / f"node/node{number}/cpulist").write_text(cpus + "\n")
    for group in siblings:
        for cpu in parse_cpus(group.split(",")):
            topology = folder / f"cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(group + "\n")
    return folder


def test_ranks_get_cores_of_their_own_on_one_node_each(tmp_path: Path) -> None:
    sysfs = machine(tmp_path, ["0,2,4,6", "1,3,5,7"], ["0,4", "1,5", "2,6", "3,7"])
    cpus = frozenset(range(8))
    assert place_ranks(2, cpus, sysfs) == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert place_ranks(4, cpus, sysfs) == [{0, 4}, {2, 6}, {1, 5}, {3, 7}]
    assert place_ranks(2, frozenset({1, 2, 3}), sysfs) == [{2}, {1, 3}]
    assert place_ranks(5, cpus, sysfs) == [cpus] * 5


def test_a_system_that_tells_nothing_of_its_cores_has_one_for_each_cpu(tmp_path: Path) -> None:
    assert place_ranks(2, frozenset(range(4)), tmp_path) == [{0, 1}, {2, 3}]


def test_sizes_and_timeouts_out_of_range_are_refused() -> None:
    for wrong in ({"tensor_parallel_size": 0}, {"pipeline_parallel_size": -1}):
        with pytest.raises(InvalidRequestError, match="at least 1"):
            ParallelOptions(**wrong)
    with pytest.raises(InvalidRequestError, match="step_timeout_s"):
        ParallelOptions(step_timeout_s=0)
