from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fuserve.engine.config import EngineConfig
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import CapacityError, InvalidRequestError, RequestFailedError
from tests.engine.driving import ask, finish_all, make_engine, run_together
from tests.engine.fake_model import EOS, FakeExecutor, Logits, hashed_logits, saying

GREEDY = SamplingParams(temperature=0, max_tokens=100)


def test_an_answer_ends_with_the_models_end_of_turn() -> None:
    output, pieces = ask("hi?", GREEDY, saying("hello"))
    (completion,) = output.outputs
    assert completion.text == "hello"
    assert completion.token_ids == (*b"hello", EOS)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert "".join(piece.text for piece in pieces) == "hello"
    assert pieces[-1].finish_reason == "stop"
    assert output.prompt == "hi?"
    assert output.num_prompt_tokens == 4
    assert output.num_generated_tokens == 6


def test_no_piece_holds_half_a_character() -> None:
    text = "aé漢🤦🏽‍♀️z"
    _, pieces = ask("hi?", GREEDY, saying(text))
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_a_character_cut_off_by_the_length_limit_shows_as_replacement_at_the_end() -> None:
    output, pieces = ask("?", SamplingParams(temperature=0, max_tokens=3), saying("ab🤦"))
    assert output.outputs[0].text == "ab\ufffd"
    assert [piece.text for piece in pieces] == ["a", "b", "\ufffd"]


def test_max_tokens_ends_with_length() -> None:
    output, _ = ask("?", SamplingParams(temperature=0, max_tokens=3), saying("hello"))
    assert output.outputs[0].text == "hel"
    assert output.outputs[0].finish_reason == "length"


def test_the_longest_sequence_ends_with_length() -> None:
    engine = make_engine(max_model_len=40)
    params = SamplingParams(temperature=0, max_tokens=None)
    (output,) = run_together(engine, [([1] * 30, params)])
    assert output.num_generated_tokens == 10
    assert output.outputs[0].finish_reason == "length"


def test_the_cache_limits_a_sequence_like_the_model_does() -> None:
    engine = make_engine(FakeExecutor(num_blocks=2))
    (output,) = run_together(engine, [([1] * 60, SamplingParams(max_tokens=500))])
    assert output.num_generated_tokens == 4


def test_ignore_eos_goes_on() -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={EOS: 100})
    output, _ = ask("?", params)
    assert output.outputs[0].token_ids == (EOS,) * 5
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_string_over_tokens_ends_the_text_before_it() -> None:
    params = SamplingParams(temperature=0, max_tokens=100, stop=["lo w", "zzz"])
    output, pieces = ask("?", params, saying("hello world"))
    (completion,) = output.outputs
    assert completion.text == "hel" == "".join(piece.text for piece in pieces)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "lo w")
    assert bytes(completion.token_ids) == b"hello w"


def test_a_stop_string_begun_but_not_finished_is_text() -> None:
    params = SamplingParams(temperature=0, max_tokens=100, stop="lo wx")
    output, _ = ask("?", params, saying("hello w"))
    assert output.outputs[0].text == "hello w"


@pytest.mark.parametrize(("keep", "text"), [(False, "he"), (True, "hel")])
def test_a_stop_token_ends_the_text(keep: bool, text: str) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=100, stop_token_ids=[ord("l")], include_stop_str_in_output=keep
    )
    output, _ = ask("?", params, saying("hello"))
    (completion,) = output.outputs
    assert completion.text == text
    assert (completion.finish_reason, completion.stop_reason) == ("stop", ord("l"))
    assert bytes(completion.token_ids) == b"hel"


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    params = SamplingParams(
        temperature=0.3, max_tokens=4, logprobs=3, logit_bias={7: 50}, top_p=0.5, seed=0
    )
    (output,) = run_together(make_engine(), [([1, 2, 3], params)])
    (completion,) = output.outputs
    assert completion.logprobs is not None
    history = [1, 2, 3]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = hashed_logits(history).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-expected)
        assert next(iter(entry)) == token == 7
        assert set(entry) == {token, *order[:3]}
        for candidate, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[candidate], abs=1e-5)
            assert order[logprob.rank - 1] == candidate
            assert logprob.decoded_token == f"<{candidate}>"
        history.append(token)
    total = sum(
        entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_0_reports_the_chosen_token_alone() -> None:
    output, pieces = ask("?", SamplingParams(temperature=0, max_tokens=2, logprobs=0))
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    assert [list(entry) for entry in logprobs] == [[t] for t in output.outputs[0].token_ids]
    assert [piece.logprobs for piece in pieces] == [(entry,) for entry in logprobs]


def test_penalties_keep_a_token_from_being_repeated() -> None:
    params = SamplingParams(temperature=0, max_tokens=4, frequency_penalty=2, logit_bias={65: 14})
    output, _ = ask("?", params, lambda history: np.zeros(257, dtype=np.float32))
    assert output.outputs[0].token_ids == (65,) * 4
    weak = SamplingParams(temperature=0, max_tokens=4, frequency_penalty=2, logit_bias={65: 3})
    output, _ = ask("?", weak, lambda history: np.zeros(257, dtype=np.float32))
    assert output.outputs[0].token_ids == (65, 65, 0, 1)


def poisoned(victim: int) -> object:
    """NaN for the sequences that begin with the token, after three of their tokens."""

    def logits_of(history: Sequence[int]) -> Logits:
        logits = hashed_logits(history)
        if history[0] == victim and len(history) == 10 + 3:
            logits[17] = np.nan
        return logits

    return logits_of


def test_nan_logits_end_their_request_and_no_other() -> None:
    params = SamplingParams(seed=1, max_tokens=20)
    prompts = [[token] * 10 for token in (1, 2, 3)]
    healthy = run_together(make_engine(), [(prompt, params) for prompt in prompts])
    logits_of = poisoned(2)
    assert callable(logits_of)
    engine = make_engine(FakeExecutor(logits_of=logits_of))
    outputs = run_together(engine, [(prompt, params) for prompt in prompts])
    assert isinstance(outputs[1].error, RequestFailedError)
    assert "NaN" in str(outputs[1].error)
    assert outputs[1].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].token_ids == healthy[1].outputs[0].token_ids[:3]
    assert outputs[0].outputs == healthy[0].outputs
    assert outputs[2].outputs == healthy[2].outputs
    assert engine.num_free_blocks == 64


def test_one_failing_branch_ends_its_whole_request_and_frees_its_blocks() -> None:
    logits_of = poisoned(2)
    assert callable(logits_of)
    engine = make_engine(FakeExecutor(logits_of=logits_of))
    (output,) = run_together(engine, [([2] * 10, SamplingParams(n=3, seed=1, max_tokens=20))])
    assert isinstance(output.error, RequestFailedError)
    assert {completion.finish_reason for completion in output.outputs} == {"error"}
    assert engine.num_free_blocks == 64


def test_a_failing_step_ends_the_requests_in_it_and_the_engine_goes_on() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, max_num_seqs=1)
    first = engine.add_request([1], GREEDY)
    second = engine.add_request([2], GREEDY)
    healthy_step = executor.step
    executor.step = None  # type: ignore[assignment]
    (update,) = engine.step()
    executor.step = healthy_step  # type: ignore[method-assign]
    assert update.request_id == first
    assert update.output is not None and isinstance(update.output.error, RequestFailedError)
    assert isinstance(update.output.error.__cause__, TypeError)
    outputs = finish_all(engine)
    assert outputs[second].error is None
    assert engine.num_free_blocks == 64


@pytest.mark.parametrize("num_steps", [0, 1, 3, 12])
@pytest.mark.parametrize("n", [1, 3])
def test_an_aborted_request_frees_its_blocks_in_every_state(num_steps: int, n: int) -> None:
    engine = make_engine(max_num_batched_tokens=32)
    request_id = engine.add_request([1] * 100, SamplingParams(n=n, max_tokens=50))
    for _ in range(num_steps):
        engine.step()
    output = engine.abort(request_id)
    assert output is not None
    assert {completion.finish_reason for completion in output.outputs} == {"abort"}
    assert engine.num_free_blocks == 64
    assert not engine.has_unfinished
    assert engine.step() == []
    assert engine.abort(request_id) is None


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "The prompt is empty"),
        ([1] * 100, GREEDY, "no room for an answer in max_model_len = 100"),
        ([1, 257], GREEDY, "The prompt holds the token id 257"),
        ([-1], GREEDY, "token id -1"),
        ([1.5], GREEDY, "1.5, which is no token id"),
        ([1], SamplingParams(logit_bias={300: 1}), "logit_bias holds the token id 300"),
        ([1], SamplingParams(stop_token_ids=[300]), "stop_token_ids holds the token id 300"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(
    prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine = make_engine(max_model_len=100)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request(prompt, params)
    assert not engine.has_unfinished


def test_a_prompt_larger_than_the_cache_is_refused_at_once() -> None:
    engine = make_engine(FakeExecutor(num_blocks=2))
    with pytest.raises(CapacityError, match="the KV cache holds 64"):
        engine.add_request([1] * 64, GREEDY)


def test_an_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add_request([1], GREEDY, request_id="a")
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request([1], GREEDY, request_id="a")


def test_timings_are_in_order() -> None:
    output, _ = ask("?", GREEDY, saying("hello"))
    timings = output.timings
    assert timings.scheduled_s is not None and timings.first_token_s is not None
    assert timings.finished_s is not None
    assert timings.arrival_s <= timings.scheduled_s <= timings.first_token_s <= timings.finished_s
    assert timings.time_to_first_token_s == timings.first_token_s - timings.arrival_s


def test_an_engine_without_room_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_num_seqs must be at least 1"):
        EngineConfig(max_model_len=10, max_num_seqs=0)
