"""The door: takes HTTP requests, and forwards each to the replica that the router chooses."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import ray.exceptions
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fuserve.server.disconnect import ClientGoneError, unless_disconnected
from fuserve.server.errors import ApiError
from fuserve.server.event_stream import DONE
from fuserve.server.logs import log_event
from fuserve.server.replicas.exposition import merged
from fuserve.server.replicas.messages import ForwardedRequest

DEPLOYMENT = "Replica"
ANSWER_WITHIN_S = 5.0
"""For a replica to tell its metrics."""
MOST_ATTEMPTS = 4
"""Replicas that may die under a request before it is given up."""


class Door:
    """An ASGI application without a model.

    Everything but health, readiness and metrics goes to a replica, whose application is that of a
    single server: API keys, limits and errors are its. A request whose replica dies before its
    answer has begun goes to another one.

    Args:
        handle: Ray Serve's, of the replicas.
        application: what Ray Serve calls it.
        num_replicas: how many there should be.
        max_body_bytes: a longer body is cut off one byte beyond, where the replica refuses it.

    Attributes:
        draining: no new requests are taken; ``/ready`` says so.
    """

    def __init__(
        self, handle: Any, application: str, num_replicas: int, max_body_bytes: int
    ) -> None:
        self.draining = False
        self._application = application
        self._handle = handle.options(method_name="answer", stream=True)
        self._num_replicas = num_replicas
        self._max_body_bytes = max_body_bytes
        self._open: set[asyncio.Task[Any] | None] = set()
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            own = {"/health": self._health, "/ready": self._ready, "/metrics": self._metrics}
            answer = own.get(scope["path"]) if scope["method"] == "GET" else None
            if answer is not None:
                await (await answer())(scope, receive, send)
            elif self.draining:
                await _unavailable("The server is being stopped.").response()(scope, receive, send)
            else:
                await self._forward(scope, receive, send)

    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    async def drain(self, grace_s: float) -> None:
        """Wait until all requests have ended, at most so long; then end them."""
        if not self._open:
            return
        self._idle.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for task in self._open:
                if task is not None:
                    task.cancel()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        self._open.add(task)
        try:
            request = await self._read(scope, receive)
            await unless_disconnected(receive, self._answer(request, scope, receive, send))
        except ClientGoneError:
            pass  # the replica has been told
        finally:
            self._open.discard(task)
            if not self._open:
                self._idle.set()

    async def _read(self, scope: Scope, receive: Receive) -> ForwardedRequest:
        body = bytearray()
        while len(body) <= self._max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        client = scope.get("client")
        return ForwardedRequest(
            scope["method"],
            scope["path"],
            scope["query_string"],
            tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            bytes(body[: self._max_body_bytes + 1]),
            tuple(client) if client else None,
        )

    async def _answer(
        self, request: ForwardedRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        sent = _Sent(send)
        for attempt in range(MOST_ATTEMPTS):
            response = self._handle.remote(request)
            try:
                async for messages in response:
                    for message in messages:
                        await sent.send(message)
                return
            except ray.exceptions.RayActorError as error:
                log_event(
                    logging.WARNING,
                    "a replica died under a request",
                    path=request.path,
                    answer_begun=sent.started,
                    attempt=attempt + 1,
                    reason=str(error).partition("\n")[0],
                )
                if sent.started:
                    break
            except asyncio.CancelledError:
                response.cancel()
                raise
        failure = _unavailable("The replica that worked on this request died.")
        if not sent.started:
            await failure.response()(scope, receive, send)
        elif sent.is_event_stream:
            event = b"data: " + json.dumps(failure.body()).encode() + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": event})
        else:
            raise ConnectionError(failure.detail)  # only closing the connection can tell

    async def _num_ready(self) -> int:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(self._application)
        deployment = application.deployments.get(DEPLOYMENT) if application else None
        return deployment.replica_states.get("RUNNING", 0) if deployment else 0

    async def _health(self) -> Response:
        """200 while a replica lives."""
        num_ready = await self._num_ready()
        status = "ok" if num_ready else "failed"
        body = {"status": status, "replicas_ready": num_ready, "replicas": self._num_replicas}
        return JSONResponse(body, 200 if num_ready else 503)

    async def _ready(self) -> Response:
        """200 while new requests are taken."""
        if self.draining:
            return JSONResponse({"status": "draining"}, 503)
        return await self._health()

    async def _metrics(self) -> Response:
        """Those of all replicas that answer."""
        answers = self._handle.broadcast("metrics")
        pages = await answers.results_async(timeout_s=ANSWER_WITHIN_S, return_exceptions=True)
        named = dict(page for page in pages if not isinstance(page, BaseException))
        page = merged(named, await self._num_ready(), self._num_replicas)
        return Response(page, media_type=CONTENT_TYPE_LATEST)


class _Sent:
    """Forwards messages and remembers how far the answer has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            types = [value for name, value in message["headers"] if name == b"content-type"]
            self.is_event_stream = any(one.startswith(b"text/event-stream") for one in types)
        await self._send(message)


def _unavailable(message: str) -> ApiError:
    headers = {"Retry-After": "1"}
    return ApiError(503, message, kind="server_error", code="unavailable", headers=headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
