"""ImageReply: what the engine paints, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fuserve.engine.images.request import FloatArray, ImageOutput, ImageUpdate
from fuserve.engine.request_stream import RequestStream
from fuserve.errors import CapacityError, EngineStoppedError, InvalidRequestError
from fuserve.server.errors import invalid
from fuserve.server.facts import RequestFacts
from fuserve.server.images.context import ImageContext
from fuserve.server.images.params import field_error
from fuserve.server.images.pictures import png_base64

_LOOKS = {"background": "opaque", "output_format": "png", "quality": "auto"}


class ImageReply:
    """The answer to one request.

    Args:
        context: of the endpoints.
        kind: ``image_generation`` or ``image_edit``, which begins the names of events.
        stream: of the request.
        num_prompt_tokens: that the text encoder reads.
        facts: are told what came of it.
    """

    def __init__(
        self,
        context: ImageContext,
        kind: str,
        stream: RequestStream[ImageUpdate],
        num_prompt_tokens: int,
        facts: RequestFacts,
    ) -> None:
        self._context = context
        self._kind = kind
        self._stream = stream
        self._num_prompt_tokens = num_prompt_tokens
        self._facts = facts

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece; cancelling it ends the request.

        Raises:
            FuserveError, ApiError: the request failed.
        """
        data: list[dict[str, Any]] = []
        size, usage = "", _usage(0, 0)
        async with aclosing(self._stream) as updates:
            async for update in updates:
                if update.image is not None:
                    size = _size(update)
                    png = await self._png(update.image)
                    data.append({"b64_json": png, "seed": update.seed})
                if update.output is not None:
                    usage = self._end(update.output)
        return {
            "created": int(time.time()),
            "data": data,
            **_LOOKS,
            "size": size,
            "model": self._context.name,
            "usage": usage,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """An event for each preview and each picture; closing it ends the request.

        Raises:
            FuserveError, ApiError: the request failed.
        """
        num_partial: dict[int, int] = {}
        async with aclosing(self._stream) as updates:
            async for update in updates:
                if update.preview is not None:
                    number = num_partial.get(update.index, 0)
                    num_partial[update.index] = number + 1
                    png = await self._png(update.preview)
                    yield self._event("partial_image", update, png, partial_image_index=number)
                if update.image is not None:
                    # The prompt is counted once, with the first of several pictures.
                    num_text = self._num_prompt_tokens if update.index == 0 else 0
                    usage = _usage(num_text, update.num_latents)
                    png = await self._png(update.image)
                    yield self._event("completed", update, png, usage=usage)
                if update.output is not None:
                    self._end(update.output)

    def _event(self, name: str, update: ImageUpdate, png: str, **more: Any) -> bytes:
        kind = f"{self._kind}.{name}"
        event = {
            "type": kind,
            "b64_json": png,
            "created_at": int(time.time()),
            **_LOOKS,
            "size": _size(update),
            "seed": update.seed,
            "image_index": update.index,
            "step": update.step,
            "steps": update.num_steps,
            **more,
        }
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode()

    async def _png(self, picture: FloatArray) -> str:
        return await self._context.workers.run(png_base64, picture)

    def _end(self, output: ImageOutput) -> dict[str, Any]:
        """Note what came of the request, and return its usage."""
        facts = self._facts
        facts.prompt_tokens = output.num_prompt_tokens
        facts.finish_reason = output.finish_reason
        if output.begun_s is not None:
            facts.queue_s = output.begun_s - output.arrival_s
        if isinstance(output.error, InvalidRequestError):
            raise field_error(output.error) from output.error
        if isinstance(output.error, CapacityError):  # a smaller picture would fit
            raise invalid("size", str(output.error)) from output.error
        if output.error is not None:
            raise output.error
        if output.finish_reason == "abort":
            raise EngineStoppedError(
                "The server is shutting down; the request was ended. Send it again."
            )
        return _usage(output.num_prompt_tokens, output.num_latents)


def _size(update: ImageUpdate) -> str:
    return f"{update.width}x{update.height}"


def _usage(num_text: int, num_latents: int) -> dict[str, Any]:
    """OpenAI's ``usage``: what an image token is here is a place of the latents."""
    return {
        "input_tokens": num_text,
        "input_tokens_details": {"text_tokens": num_text, "image_tokens": 0},
        "output_tokens": num_latents,
        "total_tokens": num_text + num_latents,
    }
