"""The playground: a page and its scripts, served from memory."""

from __future__ import annotations

import mimetypes
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

_PAGE = "index.html"


def page_router() -> APIRouter:
    """A route for each file of the page, and none for anything else.

    The files are few and small, so they are read once: a request then needs no thread that reads
    for it. Every other path stays unknown, and the wrong method for a known one is told as such.
    """
    router = APIRouter()
    for file in files("fuserve.server").joinpath("playground").iterdir():
        path = "/" if file.name == _PAGE else f"/{file.name}"
        _add(router, path, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")
    return router


def _add(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    async def read(request: Request) -> Response:
        # The page changes with the package's version: browsers ask each time.
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    router.add_route(path, read, methods=["GET", "HEAD"], include_in_schema=False)
