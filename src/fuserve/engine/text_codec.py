"""What the engine needs of a tokenizer; ``fuserve.checkpoints.Tokenizer`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """Turns token ids into text as they come."""

    def step(self, token_id: int, /) -> str:
        """The text that is complete with this token; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end; an incomplete character shows as U+FFFD."""
        ...


class TextCodec(Protocol):
    """Between text and token ids."""

    vocab_size: int
    """One more than the largest token id."""

    eos_token_ids: frozenset[int]
    """Tokens with which the model ends its turn."""

    def token_text(self, token_id: int) -> str:
        """One token for display."""
        ...

    def tokenizer_json(self) -> str:
        """The tokenizer in the form of a ``tokenizer.json``, for guided decoding."""
        ...

    def stream(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> TextStream:
        """A stream that continues the prompt."""
        ...
