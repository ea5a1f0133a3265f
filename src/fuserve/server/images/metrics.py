"""Prometheus metrics of an image engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fuserve.engine.images.request import ImageOutput
from fuserve.engine.images.stats import ImageStats, StepKind
from fuserve.server.metrics import PREFIX

_LABEL: Final = "model_name"
_STEP_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_REQUEST_S: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class ImageMetrics:
    """An ``ImageObserver`` that keeps histograms.

    Args:
        registry: of the server.
        model_name: label of every metric.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name
        self._step = Histogram(
            f"{PREFIX}image_step_time_seconds",
            "Time of encoding a prompt (prepare), of a denoising step in full (denoise) or on a "
            "cached feature (cached), of a decode.",
            [_LABEL, "kind"],
            buckets=_STEP_S,
            registry=registry,
        )
        self._queue = Histogram(
            f"{PREFIX}image_request_queue_time_seconds",
            "From a request's arrival to its first step.",
            [_LABEL],
            buckets=_REQUEST_S,
            registry=registry,
        ).labels(model_name)
        self._end_to_end = Histogram(
            f"{PREFIX}image_e2e_request_latency_seconds",
            "From a request's arrival to its last picture.",
            [_LABEL],
            buckets=_REQUEST_S,
            registry=registry,
        ).labels(model_name)
        self._success = Counter(
            f"{PREFIX}image_request_success",
            "Requests for pictures that ended, by how.",
            [_LABEL, "finished_reason"],
            registry=registry,
        )
        for reason in ("stop", "abort", "error"):
            self._success.labels(model_name, reason)
        self._images = Counter(
            f"{PREFIX}images_generated", "Pictures.", [_LABEL], registry=registry
        ).labels(model_name)

    def watch(self, stats: Callable[[], ImageStats]) -> None:
        """Read the engine's totals from here at every scrape."""
        self._registry.register(_ImageCollector(stats, self._model_name))

    def on_step(self, kind: StepKind, seconds: float) -> None:
        """Called by the engine after every piece of work."""
        self._step.labels(self._model_name, kind).observe(seconds)

    def on_finished(self, output: ImageOutput) -> None:
        """Called by the engine at the end of every request."""
        self._success.labels(self._model_name, output.finish_reason).inc()
        self._images.inc(output.num_images)
        if output.begun_s is not None:
            self._queue.observe(output.begun_s - output.arrival_s)
        if output.finish_reason == "stop":
            self._end_to_end.observe(output.finished_s - output.arrival_s)


class _ImageCollector(Collector):
    """The engine's own counts, taken when they are scraped."""

    def __init__(self, stats: Callable[[], ImageStats], model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        stats = self._stats()
        for name, help, value in (
            ("num_image_requests_running", "Image requests that take turns.", stats.num_running),
            ("num_image_requests_waiting", "Image requests that wait.", stats.num_waiting),
            ("image_requests_bytes", "Memory that running requests hold.", stats.num_bytes),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=[_LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, help, total in (
            ("image_prompt_cache_queries", "Prompts looked up.", stats.prompt_queries_total),
            ("image_prompt_cache_hits", "Prompts found encoded.", stats.prompt_hits_total),
        ):
            counter = CounterMetricFamily(PREFIX + name, help, labels=[_LABEL])
            counter.add_metric([self._model_name], total)
            yield counter
