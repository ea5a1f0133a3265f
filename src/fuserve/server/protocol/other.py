"""The bodies of ``/v1/embeddings``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fuserve.server.protocol.chat import Message, Tool
from fuserve.server.protocol.sampling import Body, RequestBody


class EmbeddingBody(RequestBody):
    """Texts in, vectors out; ``pooling`` and ``normalize`` are fuserve's."""

    model: str | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)


class TokenizeBody(Body):
    """A prompt or a conversation; vLLM's fields."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**32)]]
