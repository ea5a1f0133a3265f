"""Guessing ahead: the same tokens in fewer steps, and no guessing where it does not pay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.engine.guided import GuidedDecoding
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.speculation import NgramIndex, PayGate, Speculator, draft_length, token_cost
from tests.engine.driving import Job, make_engine, run_together
from tests.engine.fake_model import EOS, FakeExecutor, Logits, hashed_logits, repetitive_logits

NUM_GUESSES = 6


def repetitive_jobs(max_tokens: int = 90) -> list[Job]:
    random = np.random.default_rng(7)
    styles = [
        SamplingParams(temperature=0, max_tokens=max_tokens),
        SamplingParams(temperature=0.2, seed=1, max_tokens=max_tokens),
        SamplingParams(temperature=0.4, seed=2, top_p=0.9, top_k=20, max_tokens=max_tokens),
        SamplingParams(
            temperature=0.5,
            seed=3,
            repetition_penalty=1.05,
            frequency_penalty=0.02,
            presence_penalty=0.1,
            max_tokens=max_tokens,
        ),
        SamplingParams(temperature=0.3, seed=4, n=2, logprobs=2, max_tokens=max_tokens),
        SamplingParams(
            temperature=0.3,
            seed=5,
            guided=GuidedDecoding("regex", "([a-f]{2}, )+"),
            max_tokens=max_tokens,
        ),
        SamplingParams(temperature=0.2, seed=6, min_p=0.1, stop="fa", min_tokens=9, max_tokens=80),
        SamplingParams(temperature=0.2, seed=8, logit_bias={98: 2.0}, max_tokens=max_tokens),
    ]
    return [
        (random.integers(97, 103, size=3 + 17 * i).tolist(), style)
        for i, style in enumerate(styles)
    ]


@pytest.fixture(scope="module")
def without_guessing() -> list[object]:
    outputs = [
        run_together(make_engine(FakeExecutor(logits_of=repetitive_logits)), [job])[0]
        for job in repetitive_jobs()
    ]
    return [output.outputs for output in outputs]


@settings(max_examples=25, deadline=None)
@given(
    num_guesses=st.integers(1, 9),
    budget=st.integers(1, 200),
    max_num_seqs=st.integers(1, 9),
    num_blocks=st.integers(7, 50),
)
def test_guessing_changes_no_token_logprob_or_ending(
    without_guessing: list[object],
    num_guesses: int,
    budget: int,
    max_num_seqs: int,
    num_blocks: int,
) -> None:
    executor = FakeExecutor(num_blocks, logits_of=repetitive_logits)
    engine = make_engine(
        executor,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        num_speculative_tokens=num_guesses,
    )
    outputs = run_together(engine, repetitive_jobs())
    assert [output.outputs for output in outputs] == without_guessing
    assert executor.largest_step <= budget
    assert engine.num_free_blocks == num_blocks


def test_guesses_are_right_often_and_save_steps() -> None:
    steps, outputs = [], []
    for num_guesses in (0, NUM_GUESSES):
        executor = FakeExecutor(logits_of=repetitive_logits)
        engine = make_engine(executor, num_speculative_tokens=num_guesses)
        outputs.append(run_together(engine, repetitive_jobs()[:1])[0])
        steps.append(len(executor.batches))
    assert steps[1] < 0.5 * steps[0]
    assert outputs[0].num_draft_tokens == 0
    assert 0 < outputs[1].num_accepted_tokens <= outputs[1].num_draft_tokens
    # Every accepted guess saved a step.
    assert steps[0] - steps[1] == outputs[1].num_accepted_tokens


def test_the_engine_counts_guesses() -> None:
    engine = make_engine(FakeExecutor(logits_of=repetitive_logits), num_speculative_tokens=4)
    outputs = run_together(engine, repetitive_jobs())
    stats = engine.stats()
    assert stats.draft_tokens_total == sum(output.num_draft_tokens for output in outputs)
    assert stats.accepted_tokens_total == sum(output.num_accepted_tokens for output in outputs)
    assert stats.generation_tokens_total == sum(o.num_generated_tokens for o in outputs)


def test_wrong_guesses_are_not_found_as_a_prefix_later() -> None:
    """Blocks are shared by content: a block that held a rejected guess must not be."""
    jobs = repetitive_jobs(max_tokens=150)
    executor = FakeExecutor(80, logits_of=repetitive_logits)
    engine = make_engine(executor, num_speculative_tokens=NUM_GUESSES)
    firsts = run_together(engine, jobs[:4])
    assert sum(o.num_draft_tokens - o.num_accepted_tokens for o in firsts) > 0
    follow_ups = [
        ([*prompt, *first.outputs[0].token_ids], params)
        for (prompt, params), first in zip(jobs[:4], firsts, strict=True)
    ]
    cached = run_together(engine, follow_ups)
    assert all(output.num_cached_tokens > 96 for output in cached)
    fresh = [
        run_together(make_engine(FakeExecutor(80, logits_of=repetitive_logits)), [job])[0]
        for job in follow_ups
    ]
    assert [o.outputs for o in cached] == [o.outputs for o in fresh]


def test_a_completion_may_end_within_a_guess() -> None:
    def logits_of(history: list[int]) -> Logits:
        logits = hashed_logits(history[-1:]) * 0
        logits[97 + (history[-1] - 96) % 5] = 9.0  # abcde abcde ...
        if len(history) == 43:
            logits[EOS] = 99.0
        return logits

    for num_guesses in (0, NUM_GUESSES):
        engine = make_engine(FakeExecutor(logits_of=logits_of), num_speculative_tokens=num_guesses)
        output = run_together(
            engine, [([*b"abcdeabcde"], SamplingParams(temperature=0, max_tokens=100))]
        )[0]
        (completion,) = output.outputs
        assert completion.token_ids[-1] == EOS and len(completion.token_ids) == 34
        assert completion.text == ("abcde" * 7)[:33]


def test_damage_behind_a_rejected_guess_hurts_nobody() -> None:
    """Logits are NaN after every wrong token: only guesses ever see them."""
    plain = run_together(
        make_engine(FakeExecutor(logits_of=repetitive_logits)), repetitive_jobs()[:2]
    )
    truths = [
        [*prompt, *output.outputs[0].token_ids]
        for (prompt, _), output in zip(repetitive_jobs()[:2], plain, strict=True)
    ]

    def logits_of(history: list[int]) -> Logits:
        if any(history == truth[: len(history)] for truth in truths):
            return repetitive_logits(history)
        return np.full_like(repetitive_logits(history), np.nan)

    engine = make_engine(FakeExecutor(logits_of=logits_of), num_speculative_tokens=NUM_GUESSES)
    outputs = run_together(engine, repetitive_jobs()[:2])
    assert [o.outputs for o in outputs] == [o.outputs for o in plain]
    assert any(o.num_accepted_tokens < o.num_draft_tokens for o in outputs)


def test_forced_parts_of_a_grammar_are_guessed_at_once() -> None:
    params = SamplingParams(
        guided=GuidedDecoding("regex", '"the quick brown fox jumps over the lazy dog": [01]'),
        max_tokens=100,
        seed=1,
    )
    outputs, steps = [], []
    for num_guesses in (0, 8):
        executor = FakeExecutor()
        engine = make_engine(executor, num_speculative_tokens=num_guesses)
        outputs.append(run_together(engine, [([*b"go"], params)])[0])
        steps.append(len(executor.batches))
    assert outputs[1].outputs == outputs[0].outputs
    assert steps[1] < 0.4 * steps[0]


# --- when it does not pay


@pytest.mark.parametrize(("num_letters", "pays"), [(2, True), (30, False)])
def test_guessing_goes_on_where_it_pays_and_stops_where_it_does_not(
    num_letters: int, pays: bool
) -> None:
    """Letters drawn at random: every pair stood somewhere before, what followed is chance."""

    def logits_of(history: list[int]) -> Logits:
        logits = np.full_like(hashed_logits(history), -20.0)
        logits[65 : 65 + num_letters] = 0.0
        return logits

    engine = make_engine(FakeExecutor(logits_of=logits_of), num_speculative_tokens=6)
    (output,) = run_together(engine, [([65] * 8, SamplingParams(seed=1, max_tokens=900))])
    if pays:
        assert output.num_draft_tokens > 500
        assert output.num_accepted_tokens > 0.3 * output.num_draft_tokens
    else:
        assert 10 < output.num_draft_tokens < 100  # a probe every 48 tokens


def test_a_gate_closes_after_failures_and_opens_after_a_good_probe() -> None:
    gate = PayGate()
    assert gate.length(0.12, 6) >= 2
    for _ in range(30):
        gate.observe(3, 0)
    lengths = [gate.length(0.12, 6) for _ in range(100)]
    assert sum(length > 0 for length in lengths[:40]) == 0
    assert any(lengths)
    for _ in range(20):
        gate.observe(3, 3)
    assert gate.length(0.12, 6) == 6


def test_the_more_decode_together_the_less_a_guess_is_worth() -> None:
    costs = [token_cost(n) for n in (1, 2, 8, 64)]
    assert costs == sorted(costs)
    assert costs[-1] < 1.01
    lengths = [draft_length(0.7, cost, 8) for cost in costs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] >= 3 and lengths[-1] <= 1


def test_the_index_finds_the_latest_place_of_the_longest_ending() -> None:
    index = NgramIndex()
    tokens = [1, 2, 3, 4, 9, 0, 3, 4, 7, 1, 2, 3, 4]
    assert index.lookup(tokens, 3) == [9, 0, 3]  # after 1 2 3 4, not after the later 3 4
    assert index.lookup([*tokens, 8], 3) == []


def test_a_loop_is_continued_round_and_round() -> None:
    assert NgramIndex().lookup([5, 6, 7, 6, 7], 5) == [6, 7, 6, 7, 6]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_an_index_that_grows_token_by_token_is_one_built_at_once(
    tokens: list[int], length: int
) -> None:
    growing = NgramIndex()
    for end in range(1, len(tokens)):
        growing.lookup(tokens[:end], length)
    assert growing.lookup(tokens, length) == NgramIndex().lookup(tokens, length)


def test_a_guess_is_never_longer_than_asked_for() -> None:
    speculator = Speculator(3)
    assert len(speculator.propose([1, 2] * 10, 1)) <= 3
