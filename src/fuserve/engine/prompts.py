"""The forms in which users hand over prompts and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from fuserve.errors import InvalidRequestError

Prompt = str | Sequence[int]
"""Text, or token ids."""

Message = Mapping[str, Any]
"""A chat message: ``{"role": "user", "content": "..."}``."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        InvalidRequestError: naming the item that is neither text nor token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(f"prompts must be text or token ids, got {prompts!r}.")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    for number, item in enumerate(prompts):
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            raise InvalidRequestError(f"prompts[{number}] must be text or token ids, got {item!r}.")
    return list(cast(Sequence[Prompt], prompts))


def is_conversation(request: object) -> TypeGuard[Sequence[Message]]:
    """Whether it is a list of chat messages."""
    return (
        isinstance(request, Sequence)
        and len(request) > 0
        and all(isinstance(message, Mapping) for message in request)
    )


def as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """One conversation or several, as a list.

    Raises:
        InvalidRequestError: it is neither.
    """
    if is_conversation(messages):
        return [messages]
    if isinstance(messages, Sequence) and all(is_conversation(item) for item in messages):
        return list(cast(Sequence[Sequence[Message]], messages))
    raise InvalidRequestError(
        'messages must be a list of {"role": ..., "content": ...} dicts, or a list of such lists.'
    )
