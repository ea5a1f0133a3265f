"""Prometheus metrics, with vLLM's nouns under our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fuserve.engine.outputs import RequestOutput
from fuserve.engine.stats import EngineStats, StepStats

PREFIX: Final = "fuserve:"
_LABEL: Final = "model_name"
_STEP_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_S: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_FIRST_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_S: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS: Final = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServerMetrics:
    """An ``EngineObserver`` that keeps histograms; totals are read when they are asked for.

    Args:
        model_name: label of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._step = self._histogram(
            "step_time_seconds", "Time of one engine step.", _STEP_S, "kind"
        )
        self._overhead = self._histogram(
            "step_overhead_seconds", "Time of a step outside of the model.", _STEP_S
        ).labels(model_name)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_S
        ).labels(model_name)
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time of each token after the first.", _TOKEN_S
        ).labels(model_name)
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_S
        ).labels(model_name)
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _FIRST_S
        ).labels(model_name)
        self._prompt_length = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        ).labels(model_name)
        self._answer_length = self._histogram(
            "request_generation_tokens", "Tokens of all answers to a prompt.", _TOKENS
        ).labels(model_name)
        self._success = Counter(
            f"{PREFIX}request_success",
            "Requests that ended, by how.",
            [_LABEL, "finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)
        self._http = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests, by path and status.",
            [_LABEL, "method", "path", "status"],
            registry=self.registry,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's totals from here at every scrape."""
        self.registry.register(_EngineCollector(stats, self._model_name))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def on_step(self, step: StepStats, stats: EngineStats) -> None:
        """Called by the engine after every step."""
        self._step.labels(self._model_name, step.kind).observe(step.execute_s + step.overhead_s)
        self._overhead.observe(step.overhead_s)

    def on_finished(self, output: RequestOutput) -> None:
        """Called by the engine at the end of every request."""
        timings = output.timings
        reasons: list[str] = [each.finish_reason or "abort" for each in output.outputs]
        if not output.outputs:  # an embedding
            ended = "abort" if output.embedding is None else "stop"
            reasons = [ended if output.error is None else "error"]
        for reason in reasons:
            self._success.labels(self._model_name, reason).inc()
        self._prompt_length.observe(output.num_prompt_tokens)
        self._answer_length.observe(output.num_generated_tokens)
        if timings.scheduled_s is not None:
            self._queue.observe(timings.scheduled_s - timings.arrival_s)
        if timings.finished_s is not None:
            self._end_to_end.observe(timings.finished_s - timings.arrival_s)
        if timings.time_to_first_token_s is not None:
            self._first_token.observe(timings.time_to_first_token_s)
        longest = max((len(each.token_ids) for each in output.outputs), default=0)
        if timings.decode_s is not None and longest > 1:
            self._per_token.observe(timings.decode_s / (longest - 1))

    def on_http(self, method: str, path: str, status: int) -> None:
        """Called at the end of every HTTP request; ``path`` is the route's, not the client's."""
        self._http.labels(self._model_name, method, path, str(status)).inc()

    def _histogram(
        self, name: str, help: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            PREFIX + name, help, [_LABEL, *labels], buckets=buckets, registry=self.registry
        )


class _EngineCollector(Collector):
    """The engine's own counts, taken when they are scraped."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        stats = self._stats()
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        gauges = {
            "num_requests_running": ("Completions in the running batch.", stats.num_running),
            "num_requests_waiting": ("Completions that wait.", stats.num_waiting),
            "num_tokens_waiting": ("Prompt tokens that wait.", stats.num_waiting_tokens),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 1 is all.", used),
            "kv_cache_blocks": ("Blocks of the KV cache.", stats.num_blocks),
            "kv_cache_reusable_blocks": (
                "Blocks that hold a prefix which may come again.",
                stats.num_cached_blocks,
            ),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=[_LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        counters = {
            "prompt_tokens": ("Prompt tokens.", stats.prompt_tokens_total),
            "generation_tokens": ("Generated tokens.", stats.generation_tokens_total),
            "num_preemptions": ("Completions that were set back.", stats.num_preemptions_total),
            "prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens_total,
            ),
            "prefix_cache_hits": (
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens_total,
            ),
            "spec_decode_num_draft_tokens": ("Guessed tokens.", stats.draft_tokens_total),
            "spec_decode_num_accepted_tokens": (
                "Guessed tokens that were right.",
                stats.accepted_tokens_total,
            ),
        }
        for name, (help, total) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, help, labels=[_LABEL])
            counter.add_metric([self._model_name], total)
            yield counter
