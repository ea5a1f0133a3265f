"""Stop strings: found across token boundaries, never partly emitted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StopStrings:
    """Lets text through except what is, or may become, a stop string.

    The outcome does not depend on how the text is cut into pieces: of several matches the one
    that ends first counts, and of those the longest.

    Attributes:
        strings: the stop strings, none empty.
        keep: let the matched string itself through.
        matched: the stop string that was found, None until then.
        held: the end of the text so far that may be the beginning of a stop string.
    """

    strings: tuple[str, ...]
    keep: bool = False
    matched: str | None = None
    held: str = field(default="", init=False)

    def push(self, text: str) -> str:
        """Add text; return what may be emitted now. After a match nothing is emitted."""
        if not self.strings or not text:
            return text
        text = self.held + text
        match = self._first_match(text)
        if match is not None:
            end, self.matched = match
            self.held = ""
            return text[: end if self.keep else end - len(self.matched)]
        num_held = self._num_held(text)
        self.held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back; the text has ended, so it is no stop string."""
        text, self.held = self.held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [
            (start + len(string), -len(string), string)
            for string in self.strings
            if (start := text.find(string)) >= 0
        ]
        if not matches:
            return None
        end, _, string = min(matches)
        return end, string

    def _num_held(self, text: str) -> int:
        longest = max(len(string) for string in self.strings) - 1
        for size in range(min(longest, len(text)), 0, -1):
            suffix = text[-size:]
            if any(string.startswith(suffix) for string in self.strings):
                return size
        return 0
