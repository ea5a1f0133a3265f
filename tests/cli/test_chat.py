"""``fuserve chat`` from a pipe, with the demo model."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fuserve import CompletionStream, Piece
from tests.cli.conftest import Run, RunJson

CHAT = ["chat", "--model", "demo", "--temperature", "0", "--max-tokens", "4"]
CHAT += ["--max-model-len", "256", "--max-num-seqs", "1"]


def test_lines_of_a_pipe_are_answered_in_order(run_json: RunJson, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"Name a river.\n\nAnd another one?\n/save {saved}\n/quit\nnot reached\n"
    report = run_json(*CHAT, stdin=lines)
    roles = [message["role"] for message in report["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert len(report["answers"]) == 2
    assert report["answers"][1]["prompt_tokens"] > report["answers"][0]["prompt_tokens"]
    assert json.loads(saved.read_text()) == report["messages"]


def test_answers_stream_to_stdout_and_everything_else_to_stderr(run: Run) -> None:
    result = run(*CHAT, "--system", "Be brief.", stdin="/help\nHello\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "/reset" in result.stderr and "/reset" not in result.stdout
    assert "tokens/s" in result.stderr


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(run_json: RunJson) -> None:
    report = run_json(*CHAT, stdin="word " * 400 + "\nHello\n")
    assert report["messages"][0]["content"] == "Hello"
    assert len(report["answers"]) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(
    run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces_seen = []
    next_piece = CompletionStream.__next__

    def press_ctrl_c_in_the_second_step(self: CompletionStream) -> Piece:
        pieces_seen.append(next_piece(self))
        if len(pieces_seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return pieces_seen[-1]

    monkeypatch.setattr(CompletionStream, "__next__", press_ctrl_c_in_the_second_step)
    report = run_json(*CHAT, stdin="Name a river.\nAnd another?\n")
    first, second = report["answers"]
    assert (first["finish_reason"], first["output_tokens"]) == ("interrupted", 2)
    assert (second["finish_reason"], second["output_tokens"]) == ("length", 4)
    assert report["messages"][1] == {"role": "assistant", "content": first["text"]}
    assert len(report["messages"]) == 4
