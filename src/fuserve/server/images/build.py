"""From what a user asked to serve to a started image engine."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

from fuserve.diffusion.memory_plan import plan_memory
from fuserve.diffusion.model import MAX_TEXT_STATE_BYTES, DiffusionModel, read_parts
from fuserve.diffusion.options import DiffusionOptions
from fuserve.engine.images.engine import ImageEngine
from fuserve.errors import MissingExtraError
from fuserve.server.images.context import ServedImages
from fuserve.server.images.metrics import ImageMetrics
from fuserve.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """An image model to serve.

    Attributes:
        model: as ``DiffusionModel.load`` takes it.
        names: what requests may call it; the first one is reported.
        options: how it runs.
        max_queue_requests: that may wait to begin.
    """

    model: str
    names: tuple[str, ...]
    options: DiffusionOptions
    max_queue_requests: int = 32


def reserved_bytes(settings: ImageSettings) -> int:
    """Memory that the model is going to take: weights are only packed when they are first used.

    Raises:
        FuserveError: as ``DiffusionModel.load``.
    """
    options = settings.options
    if options.memory_bytes is not None:
        return options.memory_bytes
    plan = plan_memory(read_parts(settings.model, options), options, sys.maxsize)
    return plan.total + MAX_TEXT_STATE_BYTES


def start_images(settings: ImageSettings, metrics: ServerMetrics) -> ServedImages:
    """Load the model on an engine of its own.

    Raises:
        MissingExtraError: Pillow, which reads and writes picture files, is not there.
        FuserveError: as ``DiffusionModel.load``.
    """
    if find_spec("PIL") is None:
        raise MissingExtraError("pillow", "image", "serving an image model")
    observer = ImageMetrics(metrics.registry, settings.names[0])
    engine = ImageEngine(
        lambda: DiffusionModel.load(settings.model, settings.options),
        max_queue_requests=settings.max_queue_requests,
        observer=observer,
    )
    engine.start()
    observer.watch(engine.stats)
    return ServedImages(engine, settings.names, int(time.time()))
