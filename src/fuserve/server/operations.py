"""What operators ask: models, health, readiness, metrics, version."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from fuserve.engine.engine_thread import EngineHealth
from fuserve.server.served import Served


def operation_router(served: Served) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """The names of the models that are served."""
        return JSONResponse({"object": "list", "data": served.models()})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        """One of them."""
        return JSONResponse(served.model(name))

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """200 while the engines' threads live and their steps come to an end."""
        return _answer(served.health())

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """200 while new requests are taken."""
        if served.draining:
            return JSONResponse({"status": "draining"}, 503)
        return _answer(served.readiness())

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(served.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", response_model=None)
    async def show_version() -> Response:
        """The version of fuserve."""
        return JSONResponse({"version": version("fuserve")})

    return router


def _answer(state: EngineHealth) -> Response:
    if state.ok:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "failed", "reason": state.reason}, 503)
