"""What operators ask: models, health, readiness, metrics, version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from fuserve.engine.async_engine import EngineHealth
from fuserve.server.context import ServerContext


def operation_router(context: ServerContext) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """The names of the model that is served."""
        data = [_model(context, name) for name in context.model.names]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        """One of them."""
        context.check_model(name)
        return JSONResponse(_model(context, name))

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """200 while the engine's thread lives and its steps come to an end."""
        return _answer(context.engine.health())

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """200 while new requests are taken."""
        if context.draining:
            return JSONResponse({"status": "draining"}, 503)
        return _answer(context.engine.readiness())

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", response_model=None)
    async def show_version() -> Response:
        """The version of fuserve."""
        return JSONResponse({"version": version("fuserve")})

    return router


def _answer(state: EngineHealth) -> Response:
    if state.ok:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "failed", "reason": state.reason}, 503)


def _model(context: ServerContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.model.created,
        "owned_by": "fuserve",
        "root": context.model.name,
        "max_model_len": context.model.max_model_len,
    }
