"""The FastAPI application: routes, errors, and what every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from fuserve.checkpoints import Tokenizer
from fuserve.engine.async_engine import AsyncEngine
from fuserve.errors import FuserveError
from fuserve.server.api_keys import ApiKeys
from fuserve.server.chat import chat_router
from fuserve.server.completions import completion_router
from fuserve.server.config import ServedModel, ServerConfig
from fuserve.server.context import ServerContext
from fuserve.server.embeddings import embedding_router
from fuserve.server.failures import answer_to
from fuserve.server.gate import Gate
from fuserve.server.images.context import ServedImages
from fuserve.server.metrics import ServerMetrics
from fuserve.server.operations import operation_router
from fuserve.server.page import page_router
from fuserve.server.served import Served
from fuserve.server.tokens import token_router
from fuserve.server.tracing import Tracer
from fuserve.server.workers import Workers


def create_app(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    model: ServedModel,
    config: ServerConfig,
    metrics: ServerMetrics | None = None,
    images: ServedImages | None = None,
) -> FastAPI:
    """The application for one engine. ``app.state.served`` is what it serves.

    Args:
        engine: started by the caller, who also drains it.
        tokenizer: the model's.
        model: how the model is named, and its limits.
        config: limits, keys, logs.
        metrics: the engine's observer, where it has one.
        images: an image model beside it.

    Raises:
        MissingExtraError: spans are to be sent, but OpenTelemetry is not installed.
    """
    metrics = metrics or ServerMetrics(model.name)
    metrics.watch(engine.stats)
    workers = Workers()
    context = ServerContext(engine, tokenizer, model, config, metrics, workers)
    beside = None if images is None else images.context(config, workers)
    return _assemble(Served(context, beside, metrics), config, workers)


def create_image_app(images: ServedImages, config: ServerConfig, metrics: ServerMetrics) -> FastAPI:
    """The application for an image model alone; see ``create_app``."""
    workers = Workers()
    return _assemble(Served(None, images.context(config, workers), metrics), config, workers)


def _assemble(served: Served, config: ServerConfig, workers: Workers) -> FastAPI:
    tracer = None if config.otlp_endpoint is None else Tracer(config.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()
        if tracer is not None:
            tracer.close()

    # No pages of documentation: FastAPI's load scripts from the network.
    app = FastAPI(
        title="fuserve", docs_url=None, redoc_url=None, lifespan=lifespan, strict_content_type=False
    )
    app.state.served = served
    for error in (FuserveError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, _answer_error)
    for router in _routers(served):
        app.include_router(router)
    app.add_middleware(
        Gate,
        keys=ApiKeys(config.api_keys),
        max_body_bytes=config.max_body_bytes,
        metrics=served.metrics,
        tracer=tracer,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _routers(served: Served) -> Iterator[APIRouter]:
    if served.text is not None:
        for router in (chat_router, completion_router, embedding_router, token_router):
            yield router(served.text)
    if served.images is not None:
        from fuserve.server.images.router import image_router  # its extra may not be installed

        yield image_router(served.images)
    yield operation_router(served)
    yield page_router()


async def _answer_error(request: Request, error: Exception) -> Response:
    return answer_to(error, request.scope).response()
