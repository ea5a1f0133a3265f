"""``/v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
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
from fuserve.server.answer import json_answer
from fuserve.server.chunks import ChunkWriter
from fuserve.server.constraints import constraint_of
from fuserve.server.context import ServerContext
from fuserve.server.errors import invalid
from fuserve.server.event_stream import EventStream
from fuserve.server.facts import RequestFacts, facts_of
from fuserve.server.logprobs import CompletionLogprobs
from fuserve.server.prompts import as_token_prompts
from fuserve.server.protocol.completion import CompletionBody
from fuserve.server.submission import Job, checked_params, outputs_of, submit, updates_of
from fuserve.server.usage import usage_of


def completion_router(context: ServerContext) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        context.check_model(body.model)
        _check(body)
        facts = facts_of(request.scope)
        jobs = await _jobs(context, body)
        streams = await submit(context, facts, body, jobs)
        reply = _Reply(context, body, jobs)
        if body.streams:
            return EventStream(reply.events(streams, facts))

        async def answer() -> dict[str, Any]:
            outputs = await outputs_of(streams)
            for output in outputs:
                facts.note_output(output, keep_texts=context.config.log_prompts)
            return reply.whole(outputs)

        return await json_answer(request, answer())

    return router


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise invalid("suffix", "suffix: this model was not trained to fill in; send none.")
    if body.num_drawn < body.num_choices:
        raise invalid("best_of", f"best_of must be at least n, which is {body.num_choices}.")
    if body.ranks and body.streams:
        raise invalid("best_of", "best_of above n cannot be streamed: all must end to be compared.")
    if body.max_tokens == 0 and not body.echoes:
        raise invalid("max_tokens", "max_tokens may be 0 only with echo.")


async def _jobs(context: ServerContext, body: CompletionBody) -> list[Job]:
    constraint = constraint_of(body, body.response_format, None)
    chosen: dict[str, Any] = {
        # A step that reads a prompt gives a token: with max_tokens 0 it is not shown.
        "max_tokens": body.max_tokens or (None if body.max_tokens is None else 1),
        "n": body.num_drawn,
        "logprobs": 0 if body.ranks and body.logprobs is None else body.logprobs,
        "prompt_logprobs": body.logprobs if body.echoes else None,
        "guided": constraint and constraint.guided,
    }
    params = checked_params(context, body, **chosen)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    prompts = await as_token_prompts(context, body.prompt, "prompt")
    return [
        Job(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
            prompt=prompt.text,
            token_ids=prompt.token_ids,
            params=params,
            param="prompt" if len(prompts) == 1 else f"prompt[{number}]",
            constraint=constraint,
            priority=body.priority or 0,
        )
        for number, prompt in enumerate(prompts)
    ]


@dataclass(slots=True)
class _Echo:
    """What is shown of a prompt; ``logprobs`` of its tokens come with its first answer."""

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs | None] = ()


class _Reply:
    """Puts what the engine gives into OpenAI's shapes."""

    def __init__(self, context: ServerContext, body: CompletionBody, jobs: Sequence[Job]) -> None:
        self._context = context
        self._body = body
        self._n = body.num_choices
        self._hides_answer = body.max_tokens == 0
        self._echoes = [self._echo(job) for job in jobs]
        self._head = {
            "id": jobs[0].request_id.removesuffix("-0"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model.name,
        }

    def _echo(self, job: Job) -> _Echo:
        if not self._body.echoes:
            return _Echo()
        tokenizer = self._context.tokenizer
        text = job.prompt if job.prompt is not None else tokenizer.decode(job.token_ids)
        return _Echo(text, () if self._body.logprobs is None else job.token_ids)

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(number * self._n + index, self._echoes[number], completion)
            for number, output in enumerate(outputs)
            for index, completion in enumerate(self._shown(number, output))
        ]
        return {**self._head, "choices": choices, "usage": self._usage(outputs)}

    def _shown(self, number: int, output: RequestOutput) -> Sequence[CompletionOutput]:
        """The completions that are asked for, of those that were drawn."""
        self._echoes[number].logprobs = output.prompt_logprobs or ()
        if not self._body.ranks:
            return output.outputs
        return sorted(output.outputs, key=_logprob_per_token, reverse=True)[: self._n]

    def _choice(self, index: int, echo: _Echo, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._new_logprobs().add(
                echo.token_ids,
                echo.logprobs,
                () if self._hides_answer else completion.logprobs or (),
            )
        return {
            "index": index,
            "text": echo.text + ("" if self._hides_answer else completion.text),
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }

    def _new_logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._body.logprobs or 0, self._context.tokenizer)

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        usage = usage_of(outputs)
        if self._hides_answer:
            usage.update(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    async def events(
        self, streams: Sequence[RequestStream[RequestUpdate]], facts: RequestFacts
    ) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        writer = ChunkWriter(self._head, wants_usage=self._body.wants_usage)
        keep_texts = self._context.config.log_prompts
        choices = [
            _StreamedChoice(None if self._body.logprobs is None else self._new_logprobs())
            for _ in range(len(streams) * self._n)
        ]
        outputs: list[RequestOutput] = []
        async with aclosing(updates_of(streams)) as updates:
            async for number, update in updates:
                if update.prompt_logprobs is not None:
                    self._echoes[number].logprobs = update.prompt_logprobs
                events = [
                    writer.choice(chunk)
                    for piece in update.pieces
                    if (chunk := self._chunk(number, piece, choices)) is not None
                ]
                if update.output is not None:
                    outputs.append(update.output)
                    facts.note_output(update.output, keep_texts=keep_texts)
                    if writer.wants_usage and len(outputs) == len(streams):
                        events.append(writer.usage(self._usage(outputs)))
                if events:
                    yield "".join(events).encode()

    def _chunk(
        self, number: int, piece: Piece, choices: Sequence[_StreamedChoice]
    ) -> dict[str, Any] | None:
        """One piece; None if there is nothing to tell. The first one brings the prompt's echo."""
        index = number * self._n + piece.index
        choice = choices[index]
        echo = _Echo() if choice.begun else self._echoes[number]
        choice.begun = True
        text, entries = echo.text, echo.logprobs
        added: Sequence[TokenLogprobs] = ()
        if not self._hides_answer:
            text += piece.text
            added = piece.logprobs or ()
        if not (text or entries or added or piece.finish_reason):
            return None
        logprobs = choice.logprobs and choice.logprobs.add(echo.token_ids, entries, added)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }


@dataclass(slots=True)
class _StreamedChoice:
    """One continuation in a stream."""

    logprobs: CompletionLogprobs | None
    begun: bool = False


def _logprob_per_token(completion: CompletionOutput) -> float:
    """By this the best of several is found, as OpenAI documents it."""
    return (completion.cumulative_logprob or 0.0) / max(len(completion.token_ids), 1)
