"""Prompts in OpenAI's four forms: a text, token ids, or a list of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuserve.errors import InvalidRequestError
from fuserve.server.context import ServerContext
from fuserve.server.errors import invalid

MAX_PROMPTS = 2048
"""Of one request, as at OpenAI."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt as the engine takes it; ``text`` is None if it came as token ids."""

    text: str | None
    token_ids: Sequence[int]


async def as_token_prompts(
    context: ServerContext, given: str | list[int] | list[str] | list[list[int]], param: str
) -> list[TokenPrompt]:
    """All prompts of a request.

    Args:
        context: has the tokenizer.
        given: the field.
        param: its name.

    Raises:
        ApiError: there are none or too many, or one is no text.
    """
    items: list[str | list[int]] = []
    if isinstance(given, str):
        items = [given]
    elif given and isinstance(given[0], int):
        items = [[token for token in given if isinstance(token, int)]]
    else:
        items = [item for item in given if not isinstance(item, int)]
    if not items:
        raise invalid(param, f"{param} is empty.")
    if len(items) > MAX_PROMPTS:
        raise invalid(param, f"{param} holds {len(items)} items; at most {MAX_PROMPTS} are taken.")
    texts = [item for item in items if isinstance(item, str)]
    try:
        encoded = iter(await context.encode_all(texts))
    except InvalidRequestError as error:
        raise invalid(param, str(error)) from error
    return [
        TokenPrompt(item, next(encoded)) if isinstance(item, str) else TokenPrompt(None, item)
        for item in items
    ]
