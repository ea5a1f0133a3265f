"""``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuserve.engine.outputs import (
    CompletionOutput,
    Piece,
    RequestOutput,
    RequestUpdate,
    TokenLogprobs,
)
from fuserve.engine.request_stream import RequestStream
from fuserve.errors import InvalidRequestError
from fuserve.server.answer import json_answer
from fuserve.server.chunks import ChunkWriter
from fuserve.server.constraints import constraint_of
from fuserve.server.context import ServerContext
from fuserve.server.errors import invalid
from fuserve.server.event_stream import EventStream
from fuserve.server.facts import RequestFacts, facts_of
from fuserve.server.logprobs import chat_logprobs
from fuserve.server.protocol.chat import ChatBody
from fuserve.server.submission import Job, checked_params, outputs_of, submit, updates_of
from fuserve.server.tools.choice import ToolPlan, plan_tools
from fuserve.server.tools.formats import format_of_template
from fuserve.server.tools.parser import AnswerParser, CallDelta, Parsed
from fuserve.server.tools.prompt import describe_tools, template_messages
from fuserve.server.usage import usage_of


def chat_router(context: ServerContext) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    template = context.tokenizer.chat_template_source
    form = format_of_template(template)
    marker_id = context.tokenizer.special_token_id(form.begin) if form.special_marker else None

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        context.check_model(body.model)
        facts = facts_of(request.scope)
        plan = plan_tools(body, form, marker_id)
        job = await _job(context, body, plan)
        streams = await submit(context, facts, body, [job])
        reply = _Reply(context, body, plan, job.request_id)
        if body.streams:
            return EventStream(reply.events(streams, facts))

        async def answer() -> dict[str, Any]:
            (output,) = await outputs_of(streams)
            facts.note_output(output, keep_texts=context.config.log_prompts)
            return reply.whole(output)

        return await json_answer(request, answer())

    return router


def render_prompt(
    context: ServerContext,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation, by the model's template.

    Raises:
        InvalidRequestError: the model has no template, or it refuses the messages.
    """
    if tools and "tools" not in context.tokenizer.chat_template_source:
        messages, tools = describe_tools(messages, tools), None
    return context.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt
    )


async def _job(context: ServerContext, body: ChatBody, plan: ToolPlan) -> Job:
    messages = template_messages(body.messages)
    constraint = constraint_of(body, body.response_format, plan.guided)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true.")
    try:
        prompt = render_prompt(context, messages, plan.tools)
    except InvalidRequestError as error:
        raise invalid("messages", str(error)) from error
    chosen: dict[str, Any] = {
        "max_tokens": body.answer_tokens,
        "logprobs": body.num_logprobs,
        "guided": constraint and constraint.guided,
    }
    if plan.keep_special_tokens:
        chosen["skip_special_tokens"] = False
    return Job(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt=prompt,
        # The template has written the special tokens already.
        token_ids=await context.encode(prompt, add_special_tokens=False),
        params=checked_params(context, body, **chosen),
        param="messages",
        constraint=constraint,
        priority=body.priority or 0,
    )


class _Reply:
    """Puts what the engine gives into OpenAI's shapes."""

    def __init__(
        self, context: ServerContext, body: ChatBody, plan: ToolPlan, reply_id: str
    ) -> None:
        self._context = context
        self._body = body
        self._plan = plan
        self._head = {"id": reply_id, "created": int(time.time()), "model": context.model.name}

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": usage_of([output]),
        }

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        parser = self._new_parser()
        if parser is not None:
            pieces = [parser.push(completion.text), parser.flush()]
            calls = _joined_calls([delta for piece in pieces for delta in piece.calls])
            content = "".join(piece.content for piece in pieces)
            message["content"] = content if content or not calls else None
            if calls:
                message["tool_calls"] = calls
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": self._finish_reason(completion.finish_reason, parser),
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        if not self._body.ignore_eos:  # the token that ends an answer is not part of it
            ends = self._context.tokenizer.eos_token_ids
            entries = [entry for entry in entries if ends.isdisjoint(list(entry)[:1])]
        return chat_logprobs(entries, self._body.num_logprobs or 0, self._context.tokenizer)

    async def events(
        self, streams: Sequence[RequestStream[RequestUpdate]], facts: RequestFacts
    ) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        head = {**self._head, "object": "chat.completion.chunk"}
        writer = ChunkWriter(head, wants_usage=self._body.wants_usage)
        count = self._body.n or 1
        choices = [_StreamedChoice(index, self._new_parser()) for index in range(count)]
        async with aclosing(updates_of(streams)) as updates:
            async for _, update in updates:
                events = [
                    writer.choice(chunk)
                    for piece in update.pieces
                    for chunk in self._chunks(choices[piece.index], piece)
                ]
                if update.output is not None:
                    facts.note_output(update.output, keep_texts=self._context.config.log_prompts)
                    if writer.wants_usage:
                        events.append(writer.usage(usage_of([update.output])))
                if events:
                    yield "".join(events).encode()

    def _chunks(self, choice: _StreamedChoice, piece: Piece) -> list[dict[str, Any]]:
        """One piece's chunks: of the role first, of the reason to finish last."""
        logprobs = self._logprobs(piece.logprobs)
        deltas = choice.deltas(piece.text, last=piece.finish_reason is not None)
        has_logprobs = logprobs is not None and logprobs["content"]
        if has_logprobs and not deltas:
            deltas = [{"content": ""}]
        chunks = [_chunk(piece.index, delta) for delta in deltas]
        if has_logprobs:
            chunks[-1]["logprobs"] = logprobs
        if not choice.begun:
            choice.begun = True
            chunks.insert(0, _chunk(piece.index, {"role": "assistant", "content": ""}))
        if piece.finish_reason is not None:
            reason = self._finish_reason(piece.finish_reason, choice.parser)
            chunks.append(_chunk(piece.index, {}, reason))
        return chunks

    def _new_parser(self) -> AnswerParser | None:
        return None if self._plan.new_parser is None else self._plan.new_parser()

    def _finish_reason(self, reason: str | None, parser: AnswerParser | None) -> str | None:
        called = parser is not None and parser.num_calls > 0
        return self._plan.finish_reason if called and reason == "stop" else reason


class _StreamedChoice:
    """One answer in a stream."""

    def __init__(self, index: int, parser: AnswerParser | None) -> None:
        self.index = index
        self.parser = parser
        self.begun = False

    def deltas(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """What a piece of text adds to the message."""
        if self.parser is None:
            return [{"content": text}] if text else []
        parsed = self.parser.push(text)
        found = [parsed, self.parser.flush()] if last else [parsed]
        return [delta for each in found for delta in _parsed_deltas(each)]


def _parsed_deltas(parsed: Parsed) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"content": parsed.content}] if parsed.content else []
    return deltas + [{"tool_calls": [_call_delta(delta)]} for delta in parsed.calls]


def _call_delta(delta: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    function["name"] = delta.name
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def _joined_calls(deltas: Sequence[CallDelta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name}})
        function = calls[delta.index]["function"]
        function["arguments"] = function.get("arguments", "") + delta.arguments
    return calls


def _chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
