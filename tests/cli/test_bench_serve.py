"""``fuserve bench serve`` against a server that is not ours."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, RunJson
from tests.loadgen.fake_openai import FakeOpenAI

LOAD = ["--num-prompts", "5", "--prompt-tokens", "3-9", "--output-tokens", "2-6"]


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI().serving() as server:
        yield server


def test_a_server_is_measured_in_one_json_object(run_json: RunJson, fake: FakeOpenAI) -> None:
    report = run_json("bench", "serve", "--base-url", fake.url + "/v1", *LOAD, "--seed", "3")
    assert (report["model"], report["num_completed"], report["errors"]) == ("fake", 5, {})
    assert report["token_prompts"] is True
    assert report["workload"]["prompt_tokens"] == {"low": 3, "high": 9}
    sent = fake.bodies[-5:]  # the first one asked whether prompts may be token ids
    assert report["output_tokens"] == sum(body["max_tokens"] for body in sent)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in sent)
    assert report["ttft_ms"]["p99"] >= report["ttft_ms"]["p50"] > 0


def test_people_see_a_table(run: Run, fake: FakeOpenAI) -> None:
    result = run("bench", "serve", "--base-url", fake.url, *LOAD, "--request-rate", "1000")
    assert result.exit_code == 0, result.stderr
    assert "1000 a second" in result.stdout
    assert "time to first token" in result.stdout
    assert "output tokens/s" in result.stdout


def test_a_plot_is_a_png(run: Run, fake: FakeOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    result = run("bench", "serve", "--base-url", fake.url, *LOAD, "--plot", str(path))
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_plotting_library_is_told_before_the_run(
    run: Run, fake: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    path = str(tmp_path / "run.png")
    result = run("bench", "serve", "--base-url", fake.url, *LOAD, "--plot", path)
    assert result.exit_code == 2
    assert "fuserve[bench]" in result.stderr
    assert fake.bodies == []


def test_further_fields_reach_the_server(run: Run, fake: FakeOpenAI) -> None:
    extra = '{"logit_bias": {"2": -100}}'
    base = ["bench", "serve", "--base-url", fake.url, *LOAD, "--no-ignore-eos"]
    assert run(*base, "--extra-body", extra).exit_code == 0
    assert fake.bodies[-1]["logit_bias"] == {"2": -100}
    assert "ignore_eos" not in fake.bodies[-1]


@pytest.mark.parametrize(
    "flag",
    [
        ["--extra-body", "[1]"],
        ["--extra-body", "{"],
        ["--request-rate", "0"],
        ["--request-rate", "nan"],
        ["--prompt-tokens", "9-3"],
        ["--plot", "/no/such/folder/run.png"],
    ],
)
def test_flags_that_make_no_sense_are_refused(run: Run, fake: FakeOpenAI, flag: list[str]) -> None:
    result = run("bench", "serve", "--base-url", fake.url, *LOAD, *flag)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert fake.bodies == []


def test_a_server_that_refuses_everything_is_an_error_with_its_reason(run: Run) -> None:
    with FakeOpenAI(refuse=lambda body: (401, "bad key")).serving() as fake:
        result = run("bench", "serve", "--base-url", fake.url, *LOAD)
    assert result.exit_code == 2
    assert "401: bad key" in result.stderr


def test_no_server_at_all_is_one_line(run: Run) -> None:
    with FakeOpenAI().serving() as fake:
        pass
    result = run("bench", "serve", "--base-url", fake.url)
    assert result.exit_code == 2
    assert fake.url in result.stderr
