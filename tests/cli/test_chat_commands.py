"""What can be typed in a conversation besides questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuserve.cli.chat import Conversation, obey


@pytest.fixture
def conversation() -> Conversation:
    talk = Conversation(system="Be brief.")
    talk.add("user", "Hello")
    talk.add("assistant", "Hi.")
    return talk


def test_reset_forgets_the_turns_and_keeps_the_system_message(conversation: Conversation) -> None:
    assert obey("/reset", conversation)
    assert conversation.messages() == [{"role": "system", "content": "Be brief."}]


def test_system_sets_the_message_and_starts_anew(conversation: Conversation) -> None:
    assert obey("/system  Talk like a pirate. ", conversation)
    assert conversation.messages() == [{"role": "system", "content": "Talk like a pirate."}]
    assert obey("/system", conversation)
    assert conversation.messages() == []


def test_save_writes_what_was_said(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk so far.json"
    assert obey(f"/save {path}", conversation)
    assert json.loads(path.read_text()) == conversation.messages()


def test_a_file_that_cannot_be_written_does_not_end_the_conversation(
    conversation: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert obey(f"/save {tmp_path / 'missing' / 'talk.json'}", conversation)
    assert "cannot save" in capsys.readouterr().err
    assert len(conversation.messages()) == 3


def test_quit_ends_it(conversation: Conversation) -> None:
    assert not obey("/quit", conversation)


def test_an_unknown_command_is_answered_with_help(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert obey("/rest", conversation)
    said = capsys.readouterr().err
    assert "unknown command /rest" in said
    assert "/reset" in said
