"""``fuserve generate`` streams an answer of the demo model."""

from __future__ import annotations

from tests.cli.conftest import Run, RunJson

GREEDY = ["--model", "demo", "--temperature", "0", "--max-model-len", "128", "--max-num-seqs", "1"]


def test_the_answer_goes_to_stdout_and_the_speed_to_stderr(run: Run) -> None:
    result = run("generate", *GREEDY, "--max-tokens", "5", "The capital of France is")
    assert result.exit_code == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" not in result.stdout
    assert "tokens/s" in result.stderr


def test_the_prompt_may_come_from_a_pipe(run_json: RunJson) -> None:
    piped = run_json("generate", *GREEDY, "--max-tokens", "5", stdin="The capital of France is")
    given = run_json("generate", *GREEDY, "--max-tokens", "5", "The capital of France is")
    assert piped["text"] == given["text"]
    assert given["prompt_tokens"] == 5
    assert given["output_tokens"] == 5
    assert given["finish_reason"] == "length"


def test_chat_puts_the_prompt_through_the_template(run_json: RunJson) -> None:
    plain = run_json("generate", *GREEDY, "--max-tokens", "4", "Name a river.")
    chat = run_json("generate", *GREEDY, "--max-tokens", "4", "--chat", "Name a river.")
    assert chat["prompt_tokens"] > plain["prompt_tokens"]


def test_a_stop_string_ends_the_answer(run_json: RunJson) -> None:
    report = run_json(
        "generate", *GREEDY, "--max-tokens", "40", "--stop", "Paris", "The capital of France is"
    )
    assert "Paris" not in report["text"]
    assert report["finish_reason"] == "stop"


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(run: Run) -> None:
    result = run("generate", "--model", "/no/such/model", stdin=" \n")
    assert result.exit_code == 2
    assert "prompt is empty" in result.stderr


def test_a_parameter_out_of_range_is_refused_before_the_model_is_loaded(run: Run) -> None:
    result = run("generate", "--model", "/no/such/model", "--top-p", "1.5", "Hello")
    assert result.exit_code == 2
    assert "top_p" in result.stderr


def test_a_model_without_recommendations_is_sampled_mildly() -> None:
    from types import SimpleNamespace
    from typing import Any

    from fuserve import SamplingParams
    from fuserve.cli.answer import recommended_params

    silent: Any = SimpleNamespace(get_default_sampling_params=SamplingParams)
    assert recommended_params(silent).temperature < 1.0
    own = SamplingParams(temperature=0.2)
    speaking: Any = SimpleNamespace(get_default_sampling_params=lambda: own)
    assert recommended_params(speaking) is own
