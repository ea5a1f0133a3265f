"""Gate: what every HTTP request passes, before and after it is handled."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fuserve.server.answer import CLIENT_CLOSED_REQUEST
from fuserve.server.api_keys import ApiKeys
from fuserve.server.errors import ApiError
from fuserve.server.facts import RequestFacts, begin_facts
from fuserve.server.failures import answer_to
from fuserve.server.logs import log_event
from fuserve.server.metrics import ServerMetrics
from fuserve.server.tracing import Tracer

_GUARDED = ("/v1/", "/tokenize", "/detokenize")
_QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds


class Gate:
    """Request ids, API keys, the size of bodies, and a log line, a count and a span at the end.

    It is plain ASGI: middleware that wraps responses would hide the client's going away.

    Args:
        app: what is behind it.
        keys: who may enter.
        max_body_bytes: larger bodies are refused.
        metrics: counts requests.
        tracer: records spans, None for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        max_body_bytes: int,
        metrics: ServerMetrics,
        tracer: Tracer | None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        facts = begin_facts(scope, headers.get("x-request-id"))
        begin_ns = time.time_ns()
        status = CLIENT_CLOSED_REQUEST  # unless an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = facts.request_id
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers, facts)
            if refusal is not None:
                facts.error = refusal.detail
                await refusal.response()(scope, receive, send_with_id)
            else:
                await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            answer = answer_to(error, scope)
            if status != CLIENT_CLOSED_REQUEST:
                raise  # an answer has begun: only closing the connection can tell
            await answer.response()(scope, receive, send_with_id)
        finally:
            self._finish(scope, headers, facts, status, begin_ns)

    def _refusal(
        self, path: str, headers: Mapping[str, str], facts: RequestFacts
    ) -> ApiError | None:
        if path.startswith(_GUARDED):
            client = self._keys.client_of(headers.get("authorization"))
            if client is None:
                return ApiError(
                    401,
                    "The API key is missing or wrong. Send it as 'Authorization: Bearer <key>'.",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            facts.client = client
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Counts what comes: a body in chunks tells no length."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request body is larger than {self._max_body_bytes} bytes, the limit of this "
            "server.",
            code="request_too_large",
            headers={"Connection": "close"},
        )

    def _finish(
        self, scope: Scope, headers: Headers, facts: RequestFacts, status: int, begin_ns: int
    ) -> None:
        end_ns = time.time_ns()
        route = getattr(scope.get("route"), "path", None) or "unknown"
        self._metrics.on_http(scope["method"], route, status)
        log_event(
            logging.DEBUG if scope["path"] in _QUIET else logging.INFO,
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round((end_ns - begin_ns) / 1e9, 6),
            **{name: getattr(facts, name) for name in RequestFacts.__slots__},
        )
        if self._tracer is not None and scope["path"] not in _QUIET:
            self._tracer.record(
                facts,
                name=f"{scope['method']} {route}",
                status=status,
                begin_ns=begin_ns,
                end_ns=end_ns,
                traceparent=headers.get("traceparent"),
            )
