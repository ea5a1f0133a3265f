"""From an exception to the answer, the facts and the log."""

from __future__ import annotations

import logging

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from fuserve.errors import FuserveError
from fuserve.server.errors import ApiError, from_fuserve, from_http, from_validation
from fuserve.server.facts import facts_of
from fuserve.server.logs import log_event


def answer_to(error: Exception, scope: Scope) -> ApiError:
    """What the client is told. Faults of the server are logged with their traceback."""
    facts = facts_of(scope)
    answer = _answer(error, facts.request_id, scope)
    facts.error = answer.detail
    if answer.status_code == 500:
        log_event(logging.ERROR, "request failed", error=error, request_id=facts.request_id)
    return answer


def _answer(error: Exception, request_id: str, scope: Scope) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return from_validation(error)
    if isinstance(error, HTTPException):
        return from_http(error, scope["method"], scope["path"])
    if isinstance(error, FuserveError):
        return from_fuserve(error, request_id)
    return ApiError(
        500,
        f"The server failed; its log has the cause under the request id {request_id}.",
        kind="server_error",
        code="internal_error",
    )
