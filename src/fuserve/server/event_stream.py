"""EventStream: a response of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fuserve.server.disconnect import ClientGoneError, unless_disconnected
from fuserve.server.facts import facts_of
from fuserve.server.failures import answer_to

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends events as they come; one write holds all that one step of the engine gave.

    Nothing is sent before the first event is there, so that a request which fails early is
    answered with a status. One that fails later ends its stream with an ``error`` event. The
    events are closed, and with them the request, when the client goes away.

    Args:
        events: ready to send; an exception is answered as OpenAI would.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        try:
            await unless_disconnected(receive, self._send_all(scope, receive, send))
        except ClientGoneError:
            facts_of(scope).finish_reason = "disconnect"

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": DONE})
        except Exception as error:
            failure = answer_to(error, scope)
            if not started:
                await failure.response()(scope, receive, send)
                return
            event = b"data: " + json.dumps(failure.body()).encode() + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": event})
