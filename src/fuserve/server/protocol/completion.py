"""The body of ``/v1/completions``."""

from __future__ import annotations

from pydantic import Field

from fuserve.engine.sampling_params import MAX_LOGPROBS
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
    best_of: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the text."""
        return bool(self.echo)
