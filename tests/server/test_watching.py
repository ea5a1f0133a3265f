"""What operators see: metrics, logs and spans."""

from __future__ import annotations

import gzip
import io
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from fuserve.server.config import ServerConfig
from fuserve.server.logs import JsonFormatter
from tests.server.serving import WAIT_S, RunningServer, serving_toy

SECRET = "my cat is called Ophelia"
BODY: dict[str, Any] = {"model": "toy", "prompt": SECRET, "max_tokens": 5}

CONTRACT = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "time_to_first_token_seconds_count",
    "time_per_output_token_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "request_success_total",
    "step_time_seconds_count",
}


def ask(server: RunningServer, **change: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json=BODY | change, timeout=WAIT_S)


def scrape(server: RunningServer) -> dict[str, float]:
    """Sums over labels."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx2.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "toy"
            name = sample.name.removeprefix("fuserve:")
            totals[name] = totals.get(name, 0) + sample.value
    return totals


def test_metrics_count_what_was_done() -> None:
    with serving_toy() as server:
        before = scrape(server)
        assert CONTRACT - set(before) == {"step_time_seconds_count"}  # no step yet
        prompt = "x" * 64  # four blocks
        for _ in range(2):
            assert ask(server, prompt=prompt, n=2, max_tokens=6).status_code == 200
        assert ask(server, temperature=9).status_code == 400
        after = scrape(server)
        assert set(after) >= CONTRACT
        assert after["request_success_total"] == 4
        assert after["generation_tokens_total"] == 24
        assert after["prompt_tokens_total"] == 2 * 65
        assert after["prefix_cache_hits_total"] >= 48
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert after[f"{name}_seconds_count"] == 2
        assert after["num_requests_running"] == after["num_requests_waiting"] == 0
        assert after["step_time_seconds_sum"] > 0
        assert after["http_requests_total"] >= 3


def test_embeddings_are_counted_as_requests() -> None:
    with serving_toy() as server:
        body = {"model": "toy", "input": ["one", "two"]}
        assert httpx2.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
        assert scrape(server)["request_success_total"] == 2


@contextmanager
def captured_logs() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("fuserve.server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def requests_in(stream: io.StringIO) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [entry for entry in entries if entry["event"] == "request"]


def test_a_log_line_tells_of_a_request_but_not_what_was_said() -> None:
    with captured_logs() as stream, serving_toy(config=ServerConfig(api_keys=("k",))) as server:
        url = f"{server.url}/v1/completions"
        headers = {"authorization": "Bearer k", "x-request-id": "id-1"}
        answer = httpx2.post(url, json=BODY | {"temperature": 0}, headers=headers).json()
        httpx2.get(f"{server.url}/health")
        httpx2.post(url, json=BODY)
    first, second = requests_in(stream)
    assert first["request_id"] == "id-1"
    assert first["engine_request_id"] == answer["id"]
    assert (first["status"], first["client"], first["completion_tokens"]) == (200, "key-0", 5)
    assert first["finish_reason"] == "length"
    assert first["time_to_first_token_s"] > 0
    assert (second["status"], second["client"]) == (401, "")
    assert "Ophelia" not in stream.getvalue()
    assert "Bearer" not in stream.getvalue()


@pytest.mark.parametrize("change", [{}, {"stream": True}])
def test_prompts_are_logged_where_that_is_asked_for(change: dict[str, Any]) -> None:
    with captured_logs() as stream, serving_toy(config=ServerConfig(log_prompts=True)) as server:
        ask(server, **change)
    (entry,) = requests_in(stream)
    assert entry["prompt"] == SECRET
    assert len(entry["answers"]) == 1


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP endpoint."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            bodies.append(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join(WAIT_S)


def test_a_span_of_each_request_goes_to_the_collector_when_one_is_given() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with (
        collector() as (endpoint, bodies),
        serving_toy(config=ServerConfig(otlp_endpoint=endpoint)) as server,
    ):
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        httpx2.post(f"{server.url}/v1/completions", json=BODY, headers=headers)
        httpx2.get(f"{server.url}/health")
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (span,) = spans
    assert span.name == "POST /v1/completions"
    assert span.trace_id.hex() == trace
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    assert attributes["http.response.status_code"].int_value == 200
    assert span.end_time_unix_nano > span.start_time_unix_nano
