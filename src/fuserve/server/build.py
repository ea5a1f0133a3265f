"""From what a user asked to serve to the application: the same for one engine and for replicas."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import FastAPI

from fuserve.checkpoints import Tokenizer, load_tokenizer, open_checkpoint
from fuserve.decoder import ExecutorOptions, LoadedModel
from fuserve.engine.async_engine import AsyncEngine
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import InvalidRequestError
from fuserve.server.app import create_app, create_image_app
from fuserve.server.config import ServedModel, ServerConfig
from fuserve.server.images.build import ImageSettings, start_images
from fuserve.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All that a served engine is made from; plain data, so that it can be sent to a replica.

    Attributes:
        model: as ``load_model`` takes it.
        options: of the executor.
        names: what requests may call the model; the first one is reported.
        config: of the server.
        tokenizer: model whose tokenizer is used; None takes the model's own.
        max_itl_ms, enable_prefix_caching, num_speculative_tokens: as in ``EngineConfig``.
        max_queue_requests, max_queue_tokens: as in ``AsyncEngine``.
        memory_share: as in ``load_model``.
        log_level: of the server's log.
    """

    model: str
    options: ExecutorOptions
    names: tuple[str, ...]
    config: ServerConfig
    tokenizer: str | None = None
    max_itl_ms: float | None = None
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = 0
    max_queue_requests: int = 64
    max_queue_tokens: int = 65536
    memory_share: float = 1.0
    log_level: str = "info"


def build_app(
    loaded: LoadedModel, settings: ServeSettings, images: ImageSettings | None = None
) -> FastAPI:
    """The application over a started engine, and one for images where it is asked for.

    Raises:
        FuserveError: the image model cannot be loaded.
        InvalidRequestError: there is no tokenizer.
        MissingExtraError: spans are to be sent, but OpenTelemetry is not installed.
    """
    tokenizer = _tokenizer(loaded, settings.tokenizer)
    recommended = {} if loaded.checkpoint is None else loaded.checkpoint.generation_config
    served = ServedModel(
        settings.names,
        loaded.max_model_len,
        int(time.time()),
        SamplingParams.from_generation_config(recommended),
    )
    engine_config = EngineConfig(
        loaded.max_model_len,
        settings.options.max_num_seqs,
        settings.options.max_num_batched_tokens,
        max_itl_ms=settings.max_itl_ms,
        enable_prefix_caching=settings.enable_prefix_caching,
        num_speculative_tokens=settings.num_speculative_tokens,
    )
    metrics = ServerMetrics(served.name)
    engine = AsyncEngine(
        Engine(loaded.executor, tokenizer, engine_config),
        max_queue_requests=settings.max_queue_requests,
        max_queue_tokens=settings.max_queue_tokens,
        observer=metrics,
    )
    beside = None if images is None else start_images(images, metrics)
    app = create_app(engine, tokenizer, served, settings.config, metrics, beside)
    engine.start()
    return app


def build_image_app(images: ImageSettings, config: ServerConfig) -> FastAPI:
    """The application over a started image engine alone.

    Raises:
        FuserveError: the image model cannot be loaded.
        MissingExtraError: as ``build_app``.
    """
    metrics = ServerMetrics(images.names[0])
    return create_image_app(start_images(images, metrics), config, metrics)


def _tokenizer(loaded: LoadedModel, name: str | None) -> Tokenizer:
    if name is not None:
        return load_tokenizer(open_checkpoint(name))
    if loaded.checkpoint is None:
        raise InvalidRequestError(
            "a model with --load-format dummy has no tokenizer. Name a model with --tokenizer."
        )
    return load_tokenizer(loaded.checkpoint)
