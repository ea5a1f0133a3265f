"""Servers of images for tests."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from openai import OpenAI
from PIL import Image

from fuserve.engine.images.engine import ImageEngine
from fuserve.server.app import create_image_app
from fuserve.server.config import ServerConfig
from fuserve.server.images.context import ServedImages
from fuserve.server.images.metrics import ImageMetrics
from fuserve.server.lifecycle import listen
from fuserve.server.metrics import ServerMetrics
from tests.server.serving import WAIT_S

NAME = "painter"


def images_of(model: Any, metrics: ServerMetrics, **limits: Any) -> ServedImages:
    """A started engine with its metrics."""
    observer = ImageMetrics(metrics.registry, NAME)
    engine = ImageEngine(lambda: model, observer=observer, **limits)
    engine.start()
    observer.watch(engine.stats)
    return ServedImages(engine, (NAME,), 1)


class ImageServer:
    """A server of an image model alone."""

    def __init__(self, url: str, engine: ImageEngine) -> None:
        self.url, self.engine = url, engine
        self._clients: list[OpenAI] = []

    def client(self) -> OpenAI:
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()


@contextmanager
def serving_images(
    model: Any, config: ServerConfig | None = None, **limits: Any
) -> Iterator[ImageServer]:
    """Serve an image model alone until the block ends."""
    metrics = ServerMetrics(NAME)
    images = images_of(model, metrics, **limits)
    app = create_image_app(images, config or ServerConfig(), metrics)
    with listen("127.0.0.1", 0) as listener:
        options = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        listener.listen(512)
        thread.start()
        running = ImageServer(f"http://127.0.0.1:{listener.getsockname()[1]}", images.engine)
        try:
            yield running
        finally:
            running.close()
            drain(images.engine)
            server.should_exit = True
            thread.join(WAIT_S)


def drain(engine: ImageEngine) -> None:
    """Stop it; in a thread, as a browser's test has an event loop in its own."""
    stopping = threading.Thread(target=lambda: asyncio.run(engine.drain(0)))
    stopping.start()
    stopping.join(WAIT_S)


def pixels(b64_json: str | None) -> np.ndarray:
    """A PNG's pixels  # [height, width, channels]."""
    assert b64_json is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    assert image.format == "PNG"
    return np.asarray(image)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
