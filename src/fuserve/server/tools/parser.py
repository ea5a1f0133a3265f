"""ToolParser: an answer's text in, words for the reader and tool calls out, as the text comes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fuserve.server.tools.call_scanner import CallScanner
from fuserve.server.tools.formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of one call; ``id`` and ``name`` come with its first piece only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Parsed:
    """What a piece of text added."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerParser(Protocol):
    """Turns an answer's text into content and calls."""

    num_calls: int

    def push(self, text: str) -> Parsed:
        """Add text."""
        ...

    def flush(self) -> Parsed:
        """The text has ended."""
        ...


class ToolParser:
    """Finds calls of one format among other text.

    What turns out to be no call, such as an object without a name, is content.

    Args:
        form: how the model writes calls.
        max_calls: what follows that many is dropped; None takes all.
    """

    def __init__(self, form: ToolFormat, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._format = form
        self._max_calls = max_calls
        self._state: Literal["start", "text", "between", "call", "end"] = (
            "start" if form.bare else "text"
        )
        self._held = ""  # may be the beginning of a marker
        self._silent = True  # nothing but space since the start or the last call
        self._scanner = CallScanner()
        self._announced = False

    def push(self, text: str) -> Parsed:
        """Add text; return what is certain now."""
        parsed = Parsed()
        self._held += text
        while self._held and self._go_on(parsed):
            pass
        return parsed

    def flush(self) -> Parsed:
        """The text has ended: what was held back is content, unless it belongs to a call."""
        parsed = Parsed()
        if self._state == "call" and not self._announced:
            parsed.content = self._scanner.text
        elif self._state in ("start", "text"):
            parsed.content = self._held
        self._held = ""
        return parsed

    def _go_on(self, parsed: Parsed) -> bool:
        """Read what the state allows; False when more text is needed."""
        if self.num_calls == self._max_calls and self._state != "call":
            self._held = ""
            return False
        if self._state == "start":
            return self._start()
        if self._state == "text":
            return self._find_begin(parsed)
        if self._state == "between":
            return self._between()
        if self._state == "call":
            return self._read_call(parsed)
        return self._find_end()

    def _start(self) -> bool:
        first = self._held.lstrip()
        if first:
            self._state = "between" if first[0] in "{[" else "text"
        return bool(first)

    def _find_begin(self, parsed: Parsed) -> bool:
        marker = self._format.begin
        before, found, behind = self._held.partition(marker) if marker else (self._held, "", "")
        if found:
            self._state, self._held = "between", behind
            parsed.content += "" if self._silent and not before.strip() else before
            self._silent = True
            return True
        num_held = _partial(self._held, marker)
        content = self._held[: len(self._held) - num_held]
        if self._silent and not content.strip():
            return False  # space that a call may follow
        self._silent = False
        parsed.content += content
        self._held = self._held[len(content) :]
        return False

    def _between(self) -> bool:
        """Before a call, and between those of a list."""
        self._held = self._held.lstrip(" \t\r\n[,;")
        if not self._held:
            return False
        if self._held[0] == "{":
            self._state, self._scanner, self._announced = "call", CallScanner(), False
        else:
            self._held = self._held.removeprefix("]")
            self._state = "end" if self._format.end else "text"
        return True

    def _read_call(self, parsed: Parsed) -> bool:
        arguments, self._held = self._scanner.push(self._held)
        if self._scanner.name is not None and not self._announced:
            self._announced = True
            new_id = uuid.uuid4().hex[:9] if self._format.short_ids else new_call_id()
            delta = CallDelta(self.num_calls, arguments, new_id, self._scanner.name)
            parsed.calls.append(delta)
            self.num_calls += 1
        elif arguments:
            parsed.calls.append(CallDelta(self.num_calls - 1, arguments))
        if self._scanner.done:
            if not self._announced:
                parsed.content += self._scanner.text
            self._state = "end" if self._format.end else "between"
        return self._scanner.done

    def _find_end(self) -> bool:
        self._held = self._held.lstrip()
        marker = self._format.end
        if self._held and marker.startswith(self._held) and self._held != marker:
            return False
        if self._held:
            self._held = self._held.removeprefix(marker)
            self._state = "text"
        return bool(self._held)


class NamedCallParser:
    """The whole answer is the arguments of one function: ``tool_choice`` names it."""

    def __init__(self, name: str) -> None:
        self.num_calls = 0
        self._name = name

    def push(self, text: str) -> Parsed:
        """Pass the text on as arguments."""
        if not text:
            return Parsed()
        if self.num_calls:
            return Parsed(calls=[CallDelta(0, text)])
        self.num_calls = 1
        return Parsed(calls=[CallDelta(0, text, new_call_id(), self._name)])

    def flush(self) -> Parsed:
        """Nothing is held back."""
        return Parsed()


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _partial(text: str, marker: str) -> int:
    """Characters at the end of the text that may be the beginning of the marker."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0
