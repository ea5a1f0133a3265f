"""From what a user asked to serve to a started image engine."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

from fuserve.diffusion.memory_plan import plan_memory
from fuserve.diffusion.model import MAX_TEXT_STATE_BYTES, read_parts
from fuserve.diffusion.options import DiffusionOptions
from fuserve.engine.images.engine import ImageEngine
from fuserve.errors import MissingExtraError
from fuserve.parallel.images.model import load_image_model
from fuserve.parallel.images.options import ImageParallelOptions
from fuserve.server.images.context import ServedImages
from fuserve.server.images.metrics import ImageMetrics
from fuserve.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """An image model to serve.

    Attributes:
        model: as ``load_image_model`` takes it.
        names: what requests may call it; the first one is reported.
        options: how it runs; ``memory_bytes`` are each process's.
        parallel: the processes that denoise together.
        max_queue_requests: that may wait to begin.
    """

    model: str
    names: tuple[str, ...]
    options: DiffusionOptions
    parallel: ImageParallelOptions
    max_queue_requests: int = 32


def reserved_bytes(settings: ImageSettings) -> int:
    """Memory that all processes of the model are going to take, once weights are packed and used.

    Raises:
        FuserveError: as ``DiffusionModel.load``.
    """
    options = settings.options
    each = options.memory_bytes
    if each is None:
        plan = plan_memory(read_parts(settings.model, options), options, sys.maxsize)
        each = plan.total + MAX_TEXT_STATE_BYTES
    return each * settings.parallel.num_ranks


def start_images(settings: ImageSettings, metrics: ServerMetrics) -> ServedImages:
    """Load the model on an engine of its own.

    Raises:
        MissingExtraError: Pillow, which reads and writes picture files, is not there.
        FuserveError: as ``load_image_model``.
    """
    if find_spec("PIL") is None:
        raise MissingExtraError("pillow", "image", "serving an image model")
    observer = ImageMetrics(metrics.registry, settings.names[0])
    engine = ImageEngine(
        lambda: load_image_model(settings.model, settings.options, settings.parallel),
        max_queue_requests=settings.max_queue_requests,
        observer=observer,
    )
    engine.start()
    observer.watch(engine.stats)
    return ServedImages(engine, settings.names, int(time.time()))
