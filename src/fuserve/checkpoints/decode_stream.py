"""Text of a growing sequence of tokens, whole characters at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how decoders show bytes that are no character (yet)
_CONTEXT_TOKENS = 8
_MAX_PENDING_TOKENS = 16


class DecodeStream:
    """Decodes token by token; the pieces together are the decoded whole.

    A character's bytes may be spread over tokens, and a token's text may depend on the one
    before (a leading space). So each step decodes a short window of tokens twice, with and
    without the newest, and the difference is new text if it ends in a whole character.
    (``tokenizers.decoders.DecodeStream`` works alike, but raises an error when invalid bytes
    change the text it has given out, and cannot be flushed.)

    Args:
        decode: tokens to text.
        prompt_ids: the tokens before the first step; their text is not given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        if self._window and not decode(self._window):
            self._window = list(prompt_ids)  # all special: find the text before them
        self._given = len(self._window)  # tokens of the window whose text is given out
        self._given_text = decode(self._window)

    def step(self, token_id: int) -> str:
        """Add a token; return the text it completes, "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._given_text != "":
            self._window.pop()  # a skipped special token: it leaves no trace in what follows
            return ""
        if not text.endswith(_INCOMPLETE):
            return self._give(len(self._window), text)
        if len(self._window) - self._given > _MAX_PENDING_TOKENS:
            return self._give_settled(text)
        return ""

    def flush(self) -> str:
        """What is left at the end: an incomplete character shows as U+FFFD."""
        return self._give(len(self._window), self._decode(self._window))

    def _give(self, count: int, text: str) -> str:
        """Give out the text of the window's first ``count`` tokens."""
        new = text[len(self._given_text) :]
        if not new:
            return ""
        self._window = self._window[self._given :]
        self._given = count - self._given
        self._given_text = self._decode(self._window[: self._given])
        return new

    def _give_settled(self, text: str) -> str:
        """So much cannot be one character: give out all that later tokens cannot change."""
        for count in range(len(self._window) - 1, self._given, -1):
            before = self._decode(self._window[:count])
            if before + self._decode(self._window[count:]) == text:
                return self._give(count, before)
        return ""
