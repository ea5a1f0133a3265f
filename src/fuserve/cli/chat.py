"""``fuserve chat``: a conversation on the terminal, or from a pipe, one question a line."""

from __future__ import annotations

import json as json_module
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from fuserve.cli.answer import Answer, recommended_params, stream_answer
from fuserve.cli.flags import (
    Debug,
    Json,
    ModelFlags,
    ModelOption,
    ParallelFlags,
    SamplingFlags,
)
from fuserve.cli.output import WorkProgress, note, print_json
from fuserve.errors import CapacityError, InvalidRequestError

if TYPE_CHECKING:
    from fuserve import LLM, SamplingParams

HELP = """\
/help         show this
/reset        forget the conversation; the system message stays
/system TEXT  set the system message and forget the conversation; without TEXT, remove it
/save FILE    write the conversation to a JSON file
/quit         leave (also Ctrl-D)
Ctrl-C stops an answer; what was said so far stays in the conversation."""

Message = dict[str, str]


@dataclass(slots=True)
class Conversation:
    """The messages so far, with an optional system message first."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """All messages, as a chat template takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.turns.append({"role": role, "content": content})


def chat(
    model: ModelOption,
    flags: ModelFlags,
    parallel: ParallelFlags,
    sampling: SamplingFlags,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model; /help lists what can be typed. Reads lines from a pipe as well.

    With --json nothing is streamed; the whole conversation is printed as one object at the end.
    """
    from fuserve import LLM

    sampling.params()  # refuses what is out of range before the model is loaded
    with WorkProgress() as progress:
        llm = LLM(model, **flags.keywords(), **parallel.keywords(), progress=progress.update)
    conversation = Conversation(system)
    with llm:
        params = sampling.params(recommended_params(llm))
        answers = list(_converse(llm, params, conversation, show=not json))
    if json:
        print_json(
            {
                "model": model,
                "messages": conversation.messages(),
                "answers": [answer.report() for answer in answers],
            }
        )


def _converse(
    llm: LLM, params: SamplingParams, conversation: Conversation, *, show: bool
) -> Iterator[Answer]:
    for line in _lines():
        if line.startswith("/"):
            if not obey(line, conversation):
                return
        elif line.strip():
            answer = _reply(llm, params, conversation, line, show=show)
            if answer is not None:
                yield answer


def obey(line: str, conversation: Conversation) -> bool:
    """Carry out a ``/command``; False ends the conversation."""
    command, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.turns.clear()
        note("conversation forgotten")
    elif command == "/system":
        conversation.system = argument or None
        conversation.turns.clear()
        note("system message set" if argument else "system message removed")
    elif command == "/save":
        _save(argument, conversation)
    else:
        if command != "/help":
            note(f"unknown command {command}")
        note(HELP)
    return True


def _save(file: str, conversation: Conversation) -> None:
    if not file:
        note("/save needs a file name")
        return
    text = json_module.dumps(conversation.messages(), ensure_ascii=False, indent=2)
    try:
        Path(file).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        note(f"cannot save: {error}")
    else:
        note(f"saved {len(conversation.messages())} messages to {file}")


def _lines() -> Iterator[str]:
    """Lines typed with editing and history, or the lines of a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  input() edits lines and keeps a history once it is imported

    note("Type a message, or /help.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")


def _reply(
    llm: LLM, params: SamplingParams, conversation: Conversation, question: str, *, show: bool
) -> Answer | None:
    """Ask, stream, remember; None if the question was refused."""
    conversation.add("user", question)
    answer = Answer()
    try:
        with (
            _noticing_ctrl_c() as pressed,
            closing(stream_answer(llm, conversation.messages(), params, answer)) as deltas,
        ):
            for delta in deltas:
                if show:
                    print(delta, end="", flush=True)
                if pressed.is_set():
                    answer.finish_reason = "interrupted"
                    break
    except (CapacityError, InvalidRequestError) as error:
        conversation.turns.pop()
        note(f"{error} /reset starts anew.")
        return None
    conversation.add("assistant", answer.text)
    if show:
        print()
        note(answer.speed())
    return answer


@contextmanager
def _noticing_ctrl_c() -> Iterator[Event]:
    """Let Ctrl-C set an event instead of breaking into a step; a second one breaks in."""
    pressed = Event()

    def notice(signal_number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
