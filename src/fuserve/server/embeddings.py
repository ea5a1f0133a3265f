"""``/v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuserve.engine.outputs import EmbeddingOutput
from fuserve.errors import CapacityError, InvalidRequestError
from fuserve.server.answer import json_answer
from fuserve.server.context import ServerContext
from fuserve.server.errors import from_fuserve, invalid
from fuserve.server.facts import RequestFacts, facts_of
from fuserve.server.prompts import TokenPrompt, as_token_prompts
from fuserve.server.protocol.other import EmbeddingBody

_MAX_TOGETHER = 8
"""Texts of one request that are in the engine's queue at once: a long list must not fill it."""


def embedding_router(context: ServerContext) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=None)
    async def create_embedding(body: EmbeddingBody, request: Request) -> Response:
        """A vector for each text."""
        context.check_model(body.model)
        facts = facts_of(request.scope)
        facts.model = context.model.name
        hidden_size = context.engine.hidden_size
        if body.dimensions not in (None, hidden_size):
            raise invalid("dimensions", f"dimensions must be {hidden_size} for this model.")
        prompts = await as_token_prompts(context, body.input, "input")
        return await json_answer(request, _embed_all(context, facts, body, prompts))

    return router


async def _embed_all(
    context: ServerContext, facts: RequestFacts, body: EmbeddingBody, prompts: list[TokenPrompt]
) -> dict[str, Any]:
    outputs = await _outputs(context, facts, body, prompts)
    facts.prompt_tokens = sum(output.num_prompt_tokens for output in outputs)
    return {
        "object": "list",
        "model": context.model.name,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(output.embedding, body.encoding_format),
            }
            for index, output in enumerate(outputs)
        ],
        "usage": {"prompt_tokens": facts.prompt_tokens, "total_tokens": facts.prompt_tokens},
    }


async def _outputs(
    context: ServerContext, facts: RequestFacts, body: EmbeddingBody, prompts: list[TokenPrompt]
) -> list[EmbeddingOutput]:
    """A few at once; the first that fails ends the others."""
    places = asyncio.Semaphore(_MAX_TOGETHER)

    async def embed(prompt: TokenPrompt) -> EmbeddingOutput:
        async with places:
            return await context.engine.embed(
                prompt.token_ids,
                pooling=body.pooling,
                normalize=body.normalize,
                client=facts.client,
                priority=body.priority or 0,
                timeout_s=context.config.request_timeout_s,
            )

    tasks = [asyncio.ensure_future(embed(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    except (InvalidRequestError, CapacityError) as error:
        raise from_fuserve(error, facts.request_id, "input") from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encoded(embedding: npt.NDArray[np.float32], encoding_format: str | None) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode("ascii")
    return embedding.tolist()
