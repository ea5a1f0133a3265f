"""A request's tokens are its own: alone, batched, chunked, preempted, sharing a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.engine.sampling_params import SamplingParams
from tests.engine.driving import Job, make_engine, run_together
from tests.engine.fake_model import FakeExecutor

LENGTHS = (1, 5, 31, 32, 33, 64, 90, 130)


def jobs(max_tokens: int = 40) -> list[Job]:
    random = np.random.default_rng(3)
    styles = [
        SamplingParams(temperature=0, max_tokens=max_tokens),
        SamplingParams(seed=5, max_tokens=max_tokens),
        SamplingParams(seed=6, top_k=20, top_p=0.9, max_tokens=max_tokens),
        SamplingParams(seed=7, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=max_tokens),
    ]
    return [
        (random.integers(0, 256, size=length).tolist(), styles[i % len(styles)])
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def tokens_alone() -> list[tuple[int, ...]]:
    outputs = [run_together(make_engine(), [job])[0] for job in jobs()]
    return [output.outputs[0].token_ids for output in outputs]


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(1, 200), max_num_seqs=st.integers(1, 8), num_blocks=st.integers(6, 40))
def test_tokens_are_equal_alone_batched_chunked_and_preempted(
    tokens_alone: list[tuple[int, ...]], budget: int, max_num_seqs: int, num_blocks: int
) -> None:
    executor = FakeExecutor(num_blocks)
    engine = make_engine(executor, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    outputs = run_together(engine, jobs())
    assert [output.outputs[0].token_ids for output in outputs] == tokens_alone
    assert executor.largest_step <= budget
    assert engine.num_free_blocks == num_blocks


def test_the_tight_cache_really_preempts() -> None:
    outputs = run_together(make_engine(FakeExecutor(num_blocks=6)), jobs())
    assert sum(output.num_preemptions for output in outputs) > 0


def test_branches_are_equal_alone_and_beside_others_in_a_tight_cache() -> None:
    prompt = list(range(100))
    params = SamplingParams(n=3, seed=11, max_tokens=50)
    (alone,) = run_together(make_engine(), [(prompt, params)])
    tight = make_engine(FakeExecutor(num_blocks=6), max_num_batched_tokens=24)
    beside = run_together(tight, [*jobs(), (prompt, params), *jobs()])[len(LENGTHS)]
    assert [o.token_ids for o in beside.outputs] == [o.token_ids for o in alone.outputs]
    assert len({o.token_ids for o in alone.outputs}) == 3
    assert beside.num_preemptions > 0


def test_each_branch_has_its_own_random_numbers_and_the_first_is_that_of_n_1() -> None:
    prompt = [1, 2, 3]
    (one,) = run_together(make_engine(), [(prompt, SamplingParams(seed=1))])
    (two,) = run_together(make_engine(), [(prompt, SamplingParams(seed=1, n=2))])
    assert two.outputs[0].token_ids == one.outputs[0].token_ids
    assert two.outputs[1].token_ids != one.outputs[0].token_ids


def test_unseeded_requests_differ() -> None:
    params = SamplingParams(max_tokens=30)
    first, second = run_together(make_engine(), [([1, 2], params), ([1, 2], params)])
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_a_prompt_is_computed_once_for_all_branches() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, max_num_batched_tokens=512)
    run_together(engine, [(list(range(200)), SamplingParams(n=4, max_tokens=1))])
    num_computed = sum(len(batch.tokens) for batch in executor.batches)
    assert num_computed == 200 + 3 * (200 - 192)
