"""How likely a prompt's own tokens are, and completions that may not end too early."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.engine import prompt_scores
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import InvalidRequestError, RequestFailedError
from tests.engine.driving import make_engine, run_together
from tests.engine.fake_model import EOS, VOCAB_SIZE, FakeExecutor, Logits, hashed_logits, saying
from tests.engine.test_batch_invariance import jobs

PROMPT = np.random.default_rng(1).integers(0, 256, size=150).tolist()
SCORED = SamplingParams(prompt_logprobs=2, max_tokens=5, seed=1)


def scored_beside_others(**engine: int) -> RequestOutput:
    executor = FakeExecutor(engine.pop("num_blocks", 64))
    outputs = run_together(make_engine(executor, **engine), [*jobs(), (PROMPT, SCORED), *jobs()])
    return outputs[len(jobs())]


def test_each_token_has_its_log_probability_after_those_before_it() -> None:
    (output,) = run_together(make_engine(), [(PROMPT, SCORED)])
    assert output.prompt_logprobs is not None
    first, *others = output.prompt_logprobs
    assert first is None
    assert len(others) == len(PROMPT) - 1
    for position, entry in enumerate(others, start=1):
        assert entry is not None
        logits = hashed_logits(PROMPT[:position]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-expected)
        assert next(iter(entry)) == PROMPT[position]
        assert set(entry) == {PROMPT[position], *order[:2]}
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[token], abs=1e-5)
            assert order[logprob.rank - 1] == token


@pytest.mark.parametrize(
    "engine",
    [
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 24, "num_blocks": 7},
        {"max_num_batched_tokens": 64, "num_speculative_tokens": 4},
    ],
    ids=str,
)
def test_they_are_the_same_chunked_batched_and_preempted(engine: dict[str, int]) -> None:
    (alone,) = run_together(make_engine(), [(PROMPT, SCORED)])
    beside = scored_beside_others(**engine)
    assert beside.prompt_logprobs == alone.prompt_logprobs
    assert beside.outputs == alone.outputs


def test_a_prompt_that_is_in_the_cache_is_scored_all_the_same() -> None:
    engine = make_engine()
    first, second = (run_together(engine, [(PROMPT, SCORED)])[0] for _ in range(2))
    assert second.num_cached_tokens == 0
    assert second.prompt_logprobs == first.prompt_logprobs
    (plain,) = run_together(engine, [(PROMPT, SamplingParams(seed=1, max_tokens=5))])
    assert plain.num_cached_tokens > 0
    assert plain.outputs == first.outputs


def test_all_completions_share_the_scores() -> None:
    params = SamplingParams(prompt_logprobs=0, n=3, seed=1, max_tokens=5)
    (output,) = run_together(make_engine(), [(PROMPT, params)])
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 150
    assert len({completion.token_ids for completion in output.outputs}) == 3


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    (output,) = run_together(make_engine(), [([5], SCORED)])
    assert output.prompt_logprobs == (None,)


def test_a_step_never_holds_more_logits_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "MAX_LOGITS_BYTES", 10 * 4 * VOCAB_SIZE)
    executor = FakeExecutor()
    engine = make_engine(executor, max_num_batched_tokens=512)
    outputs = run_together(engine, [(PROMPT, SCORED), (PROMPT[:90], SCORED), *jobs()[:2]])
    assert max(len(batch.logit_rows) for batch in executor.batches) <= 10 + 4
    (alone,) = run_together(make_engine(), [(PROMPT, SCORED)])
    assert outputs[0].prompt_logprobs == alone.prompt_logprobs


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    def logits_of(history: list[int]) -> Logits:
        logits = hashed_logits(history)
        if len(history) == 40 and history == PROMPT[:40]:
            logits[7] = np.nan
        return logits

    engine = make_engine(FakeExecutor(logits_of=logits_of))
    failed, *others = run_together(engine, [(PROMPT, SCORED), *jobs()])
    assert isinstance(failed.error, RequestFailedError)
    assert "Token 41 of the prompt" in str(failed.error)
    assert [o.outputs for o in others] == [
        run_together(make_engine(), [job])[0].outputs for job in jobs()
    ]
    assert engine.num_free_blocks == 64


# --- min_tokens


def said(text: str, **params: object) -> RequestOutput:
    engine = make_engine(FakeExecutor(logits_of=saying_and_rambling(text)))
    sampling = SamplingParams(temperature=0, max_tokens=20, **params)
    return run_together(engine, [([*b"?"], sampling)])[0]


def saying_and_rambling(text: str):
    """Says the text, and if it may not end then, goes on with dots and wants to end each time."""
    say = saying(text)

    def logits_of(history: list[int]) -> Logits:
        if len(history) <= len(text) + 1:
            logits = say(history)
            logits[ord(".")] = 1.0
            return logits
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        logits[[EOS, ord(".")]] = 20.0, 10.0
        return logits

    return logits_of


def test_a_completion_does_not_end_before_min_tokens() -> None:
    assert said("hi").outputs[0].text == "hi"
    output = said("hi", min_tokens=6).outputs[0]
    assert output.text == "hi...."
    assert (output.finish_reason, len(output.token_ids)) == ("stop", 7)


def test_stop_tokens_and_stop_strings_wait_for_min_tokens_too() -> None:
    token = said("hi", stop_token_ids=[ord(".")], min_tokens=4).outputs[0]
    assert token.stop_reason != ord(".") or len(token.token_ids) > 4
    string = said("abcabcabc", stop="bc", min_tokens=5).outputs[0]
    assert (string.text, string.stop_reason) == ("abcabca", "bc")


def test_more_than_max_tokens_cannot_be_the_least() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens must be an integer in"):
        SamplingParams(min_tokens=17)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17
