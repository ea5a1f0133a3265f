"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fuserve.errors import InvalidRequestError
from fuserve.server.answer import json_response
from fuserve.server.chat import render_prompt
from fuserve.server.context import ServerContext
from fuserve.server.errors import invalid
from fuserve.server.protocol.other import DetokenizeBody, TokenizeBody
from fuserve.server.tools.prompt import template_messages


def token_router(context: ServerContext) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a prompt, or of a conversation through the chat template."""
        context.check_model(body.model)
        ids = await _encode(context, body)
        result: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": context.model.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            result["token_strs"] = [context.tokenizer.token_text(token) for token in ids]
        return json_response(result)

    @router.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids, special tokens included."""
        context.check_model(body.model)
        try:
            text = context.tokenizer.decode(body.tokens, skip_special_tokens=False)
        except InvalidRequestError as error:
            raise invalid("tokens", str(error)) from error
        return json_response({"prompt": text})

    @router.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> Response:
        """Special tokens and chat template, for clients that tokenize through this server."""
        tokenizer = context.tokenizer
        template = tokenizer.chat_template_source or None
        return json_response({**tokenizer.special_names, "chat_template": template})

    return router


async def _encode(context: ServerContext, body: TokenizeBody) -> list[int]:
    try:
        if body.messages is not None:
            text = render_prompt(
                context,
                template_messages(body.messages),
                [tool.model_dump(exclude_none=True) for tool in body.tools or []] or None,
                add_generation_prompt=body.add_generation_prompt,
            )
            special = bool(body.add_special_tokens)  # the template writes them
        else:
            text = body.prompt or ""
            special = body.add_special_tokens is not False
        return await context.encode(text, add_special_tokens=special)
    except InvalidRequestError as error:
        param = "prompt" if body.messages is None else "messages"
        raise invalid(param, str(error)) from error
