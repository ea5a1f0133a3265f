"""Errors as OpenAI's clients expect them: a status, and message, type, param, code in ``error``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fuserve.errors import (
    CapacityError,
    DeadlineError,
    EngineStoppedError,
    FuserveError,
    InvalidRequestError,
    MissingExtraError,
    QueueFullError,
)


class ApiError(HTTPException):
    """An error that is answered in OpenAI's shape.

    Args:
        status: HTTP status.
        message: what is wrong and what to do.
        kind: OpenAI's ``type``.
        param: the field of the request that is wrong.
        code: for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {
            "error": {
                "message": self.detail,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """As an answer."""
        return Response(
            json.dumps(self.body()),
            self.status_code,
            media_type="application/json",
            headers=self.headers,
        )


def invalid(param: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param)


def from_fuserve(error: FuserveError, request_id: str, param: str | None = None) -> ApiError:
    """The answer to an error of the engine or the tokenizer.

    Args:
        error: as raised.
        request_id: named where the fault is ours, so that the log can be searched for it.
        param: the field of the request that the engine was looking at, if known.
    """
    message = str(error)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(max(1, ceil(error.retry_after_s)))}
        code = "rate_limit_exceeded"
        return ApiError(429, message, kind="rate_limit_error", code=code, headers=headers)
    if isinstance(error, EngineStoppedError):
        headers = {"Retry-After": "1"}
        return ApiError(503, message, kind="server_error", code="unavailable", headers=headers)
    if isinstance(error, DeadlineError):
        return ApiError(504, message, kind="server_error", code="deadline_exceeded")
    if isinstance(error, MissingExtraError):
        return ApiError(501, message, kind="server_error", code="not_installed")
    if isinstance(error, CapacityError):
        return ApiError(400, message, param=param, code="context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, message, param=param)
    message = f"{message} (request {request_id})"
    return ApiError(500, message, kind="server_error", code="internal_error")


def from_validation(error: RequestValidationError) -> ApiError:
    """A 400 for a body that is not what the endpoint takes, naming the first wrong field."""
    problems = error.errors()
    # Of a union each member complains; the deepest complaint is about what was meant.
    problem = max(problems, key=lambda each: len(_path(each["loc"], error.body)))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {problem['ctx']['error']}.")
    path = _path(problem["loc"], error.body)
    if not path:
        return ApiError(400, "The body must be a JSON object (Content-Type: application/json).")
    param = _dotted(path)
    if problem["type"] == "extra_forbidden":
        message = f"Unknown parameter: '{param}'."
        return ApiError(400, message, param=param, code="unknown_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}.".replace("..", "."), param=param)


def from_http(error: HTTPException, method: str, path: str) -> ApiError:
    """An unknown path (404) or a wrong method (405), with OpenAI's words and codes."""
    status = error.status_code
    message, code = str(error.detail) or HTTPStatus(status).phrase, None
    if status == HTTPStatus.NOT_FOUND:
        message, code = f"Unknown path ({method} {path}). The API is under /v1.", "unknown_url"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        message, code = f"Not allowed to {method} on {path}.", "method_not_supported"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ApiError(status, message, kind=kind, code=code, headers=error.headers)


def _path(location: Sequence[int | str], body: object) -> list[int | str]:
    """A pydantic location without the names of union members: what is really in the body."""
    path: list[int | str] = []
    here: Any = body
    for step in location[1:]:
        try:
            here = here[step]
        except (LookupError, TypeError):
            if not (isinstance(here, Mapping) and step == location[-1]):
                continue  # a union's member
        path.append(step)
    return path


def _dotted(path: Sequence[int | str]) -> str:
    """``["messages", 0, "content"]`` -> ``messages[0].content``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
