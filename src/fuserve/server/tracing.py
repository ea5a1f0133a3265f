"""An OpenTelemetry span for each request, where an OTLP endpoint is configured (extra ``otel``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuserve.errors import MissingExtraError
from fuserve.server.facts import RequestFacts

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_TRACES_PATH = "/v1/traces"


class Tracer:
    """Sends spans in the background; the names of attributes are the semantic conventions'.

    Args:
        endpoint: base URL of an OTLP collector over HTTP, such as ``http://localhost:4318``.

    Raises:
        MissingExtraError: OpenTelemetry's SDK is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            purpose = "Sending spans to an OTLP endpoint"
            raise MissingExtraError("opentelemetry-sdk", "otel", purpose) from error
        url = endpoint.rstrip("/")
        url = url if url.endswith(_TRACES_PATH) else url + _TRACES_PATH
        provider = TracerProvider(resource=Resource.create({"service.name": "fuserve"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._provider: TracerProvider = provider

    def record(
        self,
        facts: RequestFacts,
        *,
        name: str,
        status: int,
        begin_ns: int,
        end_ns: int,
        traceparent: str | None,
    ) -> None:
        """Record a request that has ended, as a child of the caller's span if it has told one.

        Args:
            facts: of the request.
            name: method and route.
            status: of the answer.
            begin_ns: since the epoch.
            end_ns: since the epoch.
            traceparent: the W3C header of that name.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": traceparent} if traceparent else {}
        span = self._provider.get_tracer("fuserve.server").start_span(
            name,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(facts, status),
            start_time=begin_ns,
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR, facts.error))
        span.end(end_ns)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(facts: RequestFacts, status: int) -> dict[str, Any]:
    attributes = {
        "http.response.status_code": status,
        "gen_ai.request.id": facts.request_id,
        "gen_ai.request.model": facts.model,
        "gen_ai.usage.input_tokens": facts.prompt_tokens,
        "gen_ai.usage.output_tokens": facts.completion_tokens,
        "gen_ai.response.finish_reasons": facts.finish_reason and [facts.finish_reason],
        "gen_ai.latency.time_in_queue": facts.queue_s,
        "gen_ai.latency.time_to_first_token": facts.time_to_first_token_s,
    }
    return {name: value for name, value in attributes.items() if value is not None}
