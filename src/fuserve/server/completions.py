"""``/v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuserve.engine.outputs import CompletionOutput, Piece, RequestOutput, TokenLogprobs
from fuserve.engine.request_stream import RequestStream
from fuserve.server.answer import json_answer
from fuserve.server.chunks import ChunkWriter
from fuserve.server.constraints import constraint_of
from fuserve.server.context import ServerContext
from fuserve.server.errors import invalid
from fuserve.server.event_stream import EventStream
from fuserve.server.facts import RequestFacts, facts_of
from fuserve.server.logprobs import CompletionLogprobs, token_texts
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
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", "best_of must equal n: completions are not ranked here.")
    if body.max_tokens == 0 and not body.echoes:
        raise invalid("max_tokens", "max_tokens may be 0 only with echo.")


async def _jobs(context: ServerContext, body: CompletionBody) -> list[Job]:
    constraint = constraint_of(body, body.response_format, None)
    chosen: dict[str, Any] = {
        # A step that reads a prompt gives a token: with max_tokens 0 it is not shown.
        "max_tokens": body.max_tokens or (None if body.max_tokens is None else 1),
        "logprobs": body.logprobs,
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
    """What is shown of a prompt."""

    text: str = ""
    token_texts: list[str] = field(default_factory=list)


class _Reply:
    """Puts what the engine gives into OpenAI's shapes."""

    def __init__(self, context: ServerContext, body: CompletionBody, jobs: Sequence[Job]) -> None:
        self._context = context
        self._body = body
        self._n = body.n or 1
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
        if self._body.logprobs is None:
            return _Echo(text)
        return _Echo(text, [tokenizer.token_text(token) for token in job.token_ids])

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(number, output, completion)
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": self._usage(outputs)}

    def _choice(
        self, number: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        echo = self._echoes[number]
        logprobs = None
        if self._body.logprobs is not None:
            entries: list[TokenLogprobs | None] = list(output.prompt_logprobs or ())
            texts = list(echo.token_texts)
            if not self._hides_answer:
                entries += completion.logprobs or ()
                texts += token_texts(completion.logprobs or ())
            logprobs = CompletionLogprobs(self._body.logprobs).add(entries, texts)
        return {
            "index": number * self._n + completion.index,
            "text": echo.text + ("" if self._hides_answer else completion.text),
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        usage = usage_of(outputs)
        if self._hides_answer:
            usage.update(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    async def events(
        self, streams: Sequence[RequestStream], facts: RequestFacts
    ) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        writer = ChunkWriter(self._head, wants_usage=self._body.wants_usage)
        keep_texts = self._context.config.log_prompts
        choices = [_StreamedChoice(self._body.logprobs) for _ in range(len(streams) * self._n)]
        outputs: list[RequestOutput] = []
        async with aclosing(updates_of(streams)) as updates:
            async for number, update in updates:
                events = []
                for piece in update.pieces:
                    choice = choices[number * self._n + piece.index]
                    chunk = self._chunk(number, choice, piece, update.prompt_logprobs)
                    if chunk is not None:
                        events.append(writer.choice(chunk))
                if update.output is not None:
                    outputs.append(update.output)
                    facts.note_output(update.output, keep_texts=keep_texts)
                    if writer.wants_usage and len(outputs) == len(streams):
                        events.append(writer.usage(self._usage(outputs)))
                if events:
                    yield "".join(events).encode()

    def _chunk(
        self,
        number: int,
        choice: _StreamedChoice,
        piece: Piece,
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    ) -> dict[str, Any] | None:
        """One piece; None if there is nothing to tell. The first one brings the prompt's echo."""
        echo = _Echo() if choice.begun else self._echoes[number]
        choice.begun = True
        text, entries, texts = echo.text, list(prompt_logprobs or ()), list(echo.token_texts)
        if not self._hides_answer:
            text += piece.text
            entries += piece.logprobs or ()
            texts += token_texts(piece.logprobs or ())
        if not (text or texts or piece.finish_reason):
            return None
        return {
            "index": number * self._n + piece.index,
            "text": text,
            "logprobs": choice.logprobs and choice.logprobs.add(entries, texts),
            "finish_reason": piece.finish_reason,
        }


class _StreamedChoice:
    """One continuation in a stream."""

    def __init__(self, num_logprobs: int | None) -> None:
        self.begun = False
        self.logprobs = None if num_logprobs is None else CompletionLogprobs(num_logprobs)
