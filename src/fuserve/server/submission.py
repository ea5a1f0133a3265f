"""Handing requests to the engine, and collecting what it gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from fuserve.engine.outputs import RequestOutput, RequestUpdate
from fuserve.engine.request_stream import RequestStream
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import CapacityError, EngineStoppedError, InvalidRequestError, QueueFullError
from fuserve.server.constraints import Constraint
from fuserve.server.context import ServerContext
from fuserve.server.errors import ApiError, from_fuserve, invalid
from fuserve.server.facts import RequestFacts
from fuserve.server.protocol.sampling import SamplingBody


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt on its way to the engine.

    Attributes:
        request_id: the engine's and the response's.
        prompt: its text, None if it came as token ids.
        param: the field of the request that holds the prompt.
        constraint: of the answer; already part of ``params``.
    """

    request_id: str
    prompt: str | None
    token_ids: Sequence[int]
    params: SamplingParams
    param: str
    constraint: Constraint | None = None
    priority: int = 0


def checked_params(context: ServerContext, body: SamplingBody, **chosen: Any) -> SamplingParams:
    """The request's sampling parameters; ``chosen`` takes precedence over its fields.

    Raises:
        ApiError: naming the field that is out of range.
    """
    try:
        return body.sampling_params(context.model.default_params, **chosen)
    except InvalidRequestError as error:
        raise invalid(str(error).split(maxsplit=1)[0], str(error)) from error


async def submit(
    context: ServerContext, facts: RequestFacts, body: SamplingBody, jobs: Sequence[Job]
) -> list[RequestStream[RequestUpdate]]:
    """Queue all jobs of a request, or none.

    Raises:
        ApiError: one was refused.
    """
    facts.engine_request_id = jobs[0].request_id
    facts.model = context.model.name
    facts.streams = body.streams
    most = context.engine.max_queue_requests
    if len(jobs) > most:  # they wait together, so later would be no better
        raise invalid("prompt", f"prompt holds {len(jobs)} items; at most {most} may wait here.")
    if context.config.log_prompts:
        facts.prompt = "\n".join(job.prompt or str(list(job.token_ids)) for job in jobs)
    streams: list[RequestStream[RequestUpdate]] = []
    try:
        for job in jobs:
            streams.append(await _submit(context, facts, body, job))
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    return streams


async def _submit(
    context: ServerContext, facts: RequestFacts, body: SamplingBody, job: Job
) -> RequestStream[RequestUpdate]:
    num_tokens = len(job.token_ids)
    if num_tokens >= context.model.max_model_len:
        raise ApiError(
            400,
            f"The prompt has {num_tokens} tokens, which leaves no room for an answer: this model "
            f"runs at most {context.model.max_model_len} tokens. Shorten it.",
            param=job.param,
            code="context_length_exceeded",
        )
    try:
        if job.params.guided is not None:  # compiling a grammar takes time; it is kept
            await context.workers.run(context.engine.check_request, job.token_ids, job.params)
        return context.engine.submit(
            job.token_ids,
            job.params,
            request_id=job.request_id,
            prompt=job.prompt,
            priority=job.priority,
            client=facts.client,
            timeout_s=context.config.request_timeout_s,
        )
    except (QueueFullError, EngineStoppedError):
        raise
    except (InvalidRequestError, CapacityError) as error:
        raise from_fuserve(error, facts.request_id, _param_of(error, body, job)) from error


def _param_of(error: Exception, body: SamplingBody, job: Job) -> str:
    """The field that the engine's message is about."""
    message = str(error)
    first = message.split(maxsplit=1)[0]
    if first in type(body).model_fields:
        return first
    if job.constraint is not None and "guided" in message.lower():
        return job.constraint.param
    return job.param


async def updates_of(
    streams: Sequence[RequestStream[RequestUpdate]],
) -> AsyncGenerator[tuple[int, RequestUpdate], None]:
    """The updates of all streams as they come, with the number of their stream.

    Closing it ends what has not ended.

    Raises:
        FuserveError: a request failed; the others of the same body end with it.
    """
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        if len(streams) == 1:
            async for update in streams[0]:
                _check(update.output)
                yield 0, update
            return
        queue: asyncio.Queue[tuple[int, RequestUpdate | Exception]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(n, stream, queue)) for n, stream in enumerate(streams)]
        try:
            num_open = len(streams)
            while num_open:
                number, news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                _check(news.output)
                num_open -= news.output is not None
                yield number, news
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def outputs_of(streams: Sequence[RequestStream[RequestUpdate]]) -> list[RequestOutput]:
    """The outputs of all streams, in their order.

    Raises:
        FuserveError: a request failed; the others end with it.
    """
    outputs: dict[int, RequestOutput] = {}
    async with aclosing(updates_of(streams)) as updates:
        async for number, update in updates:
            if update.output is not None:
                outputs[number] = update.output
    return [outputs[number] for number in range(len(streams))]


async def _pump(
    number: int,
    stream: RequestStream[RequestUpdate],
    queue: asyncio.Queue[tuple[int, RequestUpdate | Exception]],
) -> None:
    try:
        async for update in stream:
            queue.put_nowait((number, update))
    except Exception as error:
        queue.put_nowait((number, error))


def _check(output: RequestOutput | None) -> None:
    if output is None:
        return
    if output.error is not None:
        raise output.error
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise EngineStoppedError(
            "The server is shutting down; the request was ended. Send it again."
        )
