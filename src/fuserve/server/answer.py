"""Answers in one piece."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fuserve.server.disconnect import ClientGoneError, unless_disconnected
from fuserve.server.facts import facts_of

CLIENT_CLOSED_REQUEST = 499


async def json_answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """Do the work and answer with its result; a client that goes away ends the work."""
    try:
        result = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        facts_of(request.scope).finish_reason = "disconnect"
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody hears it, the log tells it
    return json_response(result)


def json_response(result: dict[str, Any]) -> Response:
    """A result as JSON."""
    return Response(json.dumps(result), media_type="application/json")
