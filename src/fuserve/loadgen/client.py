"""One request to an OpenAI-compatible server, streamed and timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx2

from fuserve.errors import InvalidRequestError
from fuserve.loadgen.vocabulary import Vocabulary, find_vocabulary
from fuserve.loadgen.workload import PlannedRequest

TIMEOUT_S = 600.0
"""How long a server may stay silent before its request counts as failed."""

EndpointKind = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked.

    Args:
        base_url: such as ``http://127.0.0.1:8000``, with or without ``/v1``.
        model: the name the server knows its model by.
        api_key: sent as a bearer token unless empty.
        endpoint: which of the two streaming endpoints is used.
        body: fields added to every request.
    """

    base_url: str
    model: str
    api_key: str = ""
    endpoint: EndpointKind = "completions"
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The server's root, without ``/v1``."""
        return self.base_url.rstrip("/").removesuffix("/v1")


@dataclass(slots=True)
class Answer:
    """What became of one request. Times are in seconds of the client's monotonic clock.

    Args:
        due_s: when the request should have been sent; latencies count from here, so that a client
            that is late does not hide a server that is.
        chunk_s: arrival of every piece of text.
        output_tokens: as the server told (``usage_reported``), else the number of chunks.
        error: empty, or what went wrong: the status, or the kind of failure, then the message.
    """

    due_s: float
    end_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int = 0
    usage_reported: bool = False
    error: str = ""


def clock_s() -> float:
    """The client's clock."""
    return time.perf_counter()


class Completer:
    """A pool of connections to one server. Use it in an ``async with`` block."""

    def __init__(self, target: Target) -> None:
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._target = target
        self._http = httpx2.AsyncClient(
            base_url=target.root,
            headers=headers,
            timeout=httpx2.Timeout(TIMEOUT_S),
            # As many connections as requests, and none kept in a queue of the client's own.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Completer:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

    async def vocabulary(self) -> Vocabulary:
        """The token ids that prompts may be made of; none where the server takes only text."""
        if self._target.endpoint == "chat":
            return Vocabulary()
        vocabulary = await find_vocabulary(self._http)
        if vocabulary.token_ids:
            probe = PlannedRequest(0.0, vocabulary.prompt(list(vocabulary.token_ids[:4])), 1)
            if (await self.complete(probe, clock_s())).error:
                return Vocabulary()
        return vocabulary

    async def complete(
        self,
        request: PlannedRequest,
        due_s: float,
        on_chunk: Callable[[Answer], None] | None = None,
    ) -> Answer:
        """Send a request now and read its stream to the end. Never raises for a server's fault.

        Args:
            request: what is asked.
            due_s: when it should have been sent.
            on_chunk: called with the answer so far whenever more of it has come.
        """
        answer = Answer(due_s)
        try:
            await self._stream(request, answer, on_chunk)
        except (httpx2.HTTPError, httpx2.SSEError) as error:
            answer.error = answer.error or f"{type(error).__name__}: {error}"
        answer.end_s = clock_s()
        if not answer.usage_reported:
            answer.output_tokens = len(answer.chunk_s)
        if not answer.error and not answer.finish_reason:
            answer.error = "incomplete: the stream ended without a finish reason"
        return answer

    async def _stream(
        self,
        request: PlannedRequest,
        answer: Answer,
        on_chunk: Callable[[Answer], None] | None,
    ) -> None:
        is_chat = self._target.endpoint == "chat"
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        pieces: list[str] = []
        async with self._http.stream("POST", path, json=self._body(request)) as response:
            if response.status_code != httpx2.codes.OK:
                answer.error = _describe(response.status_code, await response.aread())
                return
            async for event in httpx2.EventSource(response):
                now_s = clock_s()
                if event.data == "[DONE]":
                    break
                _take(event.data, answer, pieces, now_s)
                if on_chunk is not None:
                    on_chunk(answer)
        answer.text = "".join(pieces)

    def _body(self, request: PlannedRequest) -> dict[str, Any]:
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": request.prompt}]}
            if self._target.endpoint == "chat"
            else {"prompt": request.prompt}
        )
        return {
            "model": self._target.model,
            **prompt,
            "max_tokens": request.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._target.body,
        }


async def find_model(base_url: str, api_key: str) -> str:
    """The first model a server lists.

    Raises:
        InvalidRequestError: the server cannot be reached, or lists none.
    """
    target = Target(base_url, "", api_key)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx2.AsyncClient(headers=headers, trust_env=False) as http:
            response = await http.get(f"{target.root}/v1/models")
            if response.status_code != httpx2.codes.OK:
                raise InvalidRequestError(
                    f"{base_url} answers {_describe(response.status_code, response.content)}"
                )
            return str(response.json()["data"][0]["id"])
    except httpx2.HTTPError as error:
        raise InvalidRequestError(
            f"No server answers at {base_url} ({type(error).__name__}: {error})."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidRequestError(f"{base_url} lists no model; name it with --model.") from error


def _take(data: str, answer: Answer, pieces: list[str], now_s: float) -> None:
    """Add one event of a stream to the answer."""
    try:
        event = json.loads(data)
        if "error" in event:
            answer.error = f"in stream: {_message(event)}"
        else:
            _take_chunk(event, answer, pieces, now_s)
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.error = f"malformed: no chunk of a completion: {data[:80]!r}"


def _take_chunk(event: dict[str, Any], answer: Answer, pieces: list[str], now_s: float) -> None:
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
        answer.usage_reported = True
    for choice in event.get("choices", ()):
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text:
            answer.chunk_s.append(now_s)
            pieces.append(text)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _describe(status: int, body: bytes) -> str:
    """``429: the queue is full``, from OpenAI's shape of errors or from whatever came."""
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = body[:200].decode(errors="replace")
    return f"{status}: {message}"


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
