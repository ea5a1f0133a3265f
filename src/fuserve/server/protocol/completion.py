"""The body of ``/v1/completions``."""

from __future__ import annotations

from pydantic import Field

from fuserve.engine.sampling_params import MAX_CHOICES, MAX_LOGPROBS
from fuserve.server.protocol.chat import ResponseFormat
from fuserve.server.protocol.sampling import SamplingBody

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionBody(SamplingBody):
    """Prompts in, their continuations out."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the text."""
        return bool(self.echo)

    @property
    def num_choices(self) -> int:
        """Completions of a prompt that are shown."""
        return self.n or 1

    @property
    def num_drawn(self) -> int:
        """Completions of a prompt that are made."""
        return self.best_of or self.num_choices

    @property
    def ranks(self) -> bool:
        """Whether only the likeliest of those that are made are shown."""
        return self.num_drawn > self.num_choices
