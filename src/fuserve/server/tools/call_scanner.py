"""CallScanner: reads one call, a JSON object, as its text comes."""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Finds the name and passes the arguments on, piece by piece, before the object ends.

    It does not check the JSON: what the arguments are is told as it was written, and a text that
    is no object never ends.

    Attributes:
        name: of the function, None until it was read.
        done: the object has ended.
        text: all that was read.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.text = ""
        self._at = 0  # the next character to read
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key: str | None = None  # of the member at depth 1
        self._string_begin = 0
        self._value_begin: int | None = None  # of that member's value
        self._given = 0  # up to here the arguments were given out
        self._early = ""  # arguments that came before the name

    def push(self, text: str) -> tuple[str, str]:
        """Read on.

        Returns:
            New text of the arguments (none before the name is known), and what lies behind the
            object.
        """
        self.text += text
        arguments = ""
        while self._at < len(self.text) and not self.done:
            if self._in_string:
                self._read_in_string(self.text[self._at])
            else:
                arguments += self._read(self.text[self._at])
            self._at += 1
        rest, self.text = self.text[self._at :], self.text[: self._at]
        arguments += self._arguments_up_to(self._at)
        if self.name is None:
            self._early += arguments
            return "", rest
        arguments, self._early = self._early + arguments, ""
        return arguments, rest

    def _read_in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and self._value_begin is None:
                self._key = _load_string(self.text[self._string_begin : self._at + 1])

    def _read(self, char: str) -> str:
        """A character outside of strings; returns the rest of the arguments if it ends them."""
        arguments = ""
        if self._depth == 1 and char == ":" and self._value_begin is None:
            self._value_begin = self._given = self._at + 1
        elif self._depth == 1 and char in ",}" and self._value_begin is not None:
            arguments = self._end_value()
        if char == '"':
            self._in_string, self._string_begin = True, self._at
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        return arguments

    def _end_value(self) -> str:
        """The member's value ends before the next character."""
        arguments = self._arguments_up_to(self._at)
        value = self.text[self._value_begin : self._at].strip()
        if self._key == "name":
            self.name = _load_string(value)
        elif self._key in _ARGUMENTS and value.startswith('"'):
            arguments = _load_string(value) or ""  # some models write the arguments as text
        self._key = self._value_begin = None
        return arguments

    def _arguments_up_to(self, end: int) -> str:
        """Text of the arguments that has not been given out, if they are an object."""
        if self._value_begin is None or self._key not in _ARGUMENTS:
            return ""
        value = self.text[self._value_begin : end].lstrip()
        if not value.startswith("{"):
            return ""
        begin = max(self._given, end - len(value))
        self._given = end
        return self.text[begin:end]


def _load_string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
