"""``fuserve serve --replicas 2``: two engines behind one door that a client takes for one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import SERVE, WAIT_S

KEY = "secret"
FLAGS = ("--replicas", "2", "--threads", "1", "--api-key", KEY, "--max-body-mb", "0.1")

ENDLESS: dict[str, Any] = {"max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}


@dataclass
class Replicas:
    url: str
    process: psutil.Process
    client: OpenAI

    def complete(self, prompt: str, **options: Any) -> Any:
        options = {"max_tokens": 4, "temperature": 0} | options
        return self.client.completions.create(model="demo", prompt=prompt, **options)

    def actors(self) -> list[psutil.Process]:
        return [
            child
            for child in self.process.children(recursive=True)
            if "ray::ServeReplica" in " ".join(child.cmdline())
        ]

    def metric(self, name: str) -> dict[str, float]:
        """Its value in each replica."""
        page = httpx2.get(f"{self.url}/metrics", timeout=WAIT_S).text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == f"fuserve:{name}":
                    replica = sample.labels.get("replica", "")
                    values[replica] = values.get(replica, 0.0) + sample.value
        return values

    def wait_until_both_are_ready(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while len(self.metric("num_requests_running")) < 2:
            assert time.monotonic() < deadline, "a replica does not come back"
            time.sleep(0.2)

    def wait_until_nothing_runs(self) -> None:
        deadline = time.monotonic() + 10  # the tokens of an endless request take longer
        while sum(self.metric("num_requests_running").values()):
            assert time.monotonic() < deadline, "the replica works for nobody"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    """One server for all tests; at the end SIGTERM must leave no process behind."""
    with subprocess.Popen([*SERVE, *FLAGS], stderr=subprocess.PIPE, text=True) as process:
        started: list[psutil.Process] = []
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            line = next((one for one in lines if " is served at " in one), None)
            assert line is not None, "it does not start"
            threading.Thread(target=process.stderr.read, daemon=True).start()
            url = line.split(" is served at ")[1].split("/v1")[0]
            with OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=WAIT_S, max_retries=0) as client:
                yield Replicas(url, psutil.Process(process.pid), client)
            started = psutil.Process(process.pid).children(recursive=True)
            assert len(started) > 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
            _, alive = psutil.wait_procs(started, timeout=10)
            assert not alive
        finally:
            for child in started or psutil.Process(process.pid).children(recursive=True):
                if child.is_running():
                    child.kill()
            process.kill()


@pytest.fixture
def both(replicas: Replicas) -> Replicas:
    replicas.wait_until_both_are_ready()
    return replicas


def test_answers_streams_and_errors_are_those_of_a_single_server(both: Replicas) -> None:
    whole = both.complete("The capital of France is").choices[0].text
    assert "Paris" in whole
    chunks = list(both.complete("The capital of France is", stream=True))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert both.client.models.list().data[0].id == "demo"
    with pytest.raises(openai.NotFoundError) as unknown:
        both.client.completions.create(model="other", prompt="Hi")
    assert unknown.value.code == "model_not_found"
    assert httpx2.get(f"{both.url}/v1/models").status_code == 401  # without a key
    assert httpx2.post(f"{both.url}/tokenize", json={"prompt": "Hi"}).status_code == 401
    with pytest.raises(openai.APIStatusError) as large:
        both.complete("x" * 200_000)
    assert large.value.status_code == 413
    answer = httpx2.get(f"{both.url}/health", headers={"X-Request-Id": "mine"})
    assert answer.json() == {"status": "ok", "replicas_ready": 2, "replicas": 2}
    assert httpx2.get(f"{both.url}/").status_code == 200  # the playground


def test_prompts_that_begin_alike_go_to_one_replica(both: Replicas) -> None:
    before, hits_before = both.metric("prompt_tokens_total"), both.metric("prefix_cache_hits_total")
    prefix = "Once upon a time there was a small engine that ran on any machine. " * 8
    for question in ("It was", "They", "She", "Every day"):
        both.complete(prefix + question)
    after, hits_after = both.metric("prompt_tokens_total"), both.metric("prefix_cache_hits_total")
    used = [replica for replica in after if after[replica] > before[replica]]
    assert len(used) == 1
    assert hits_after[used[0]] - hits_before[used[0]] > 3 * 64


def test_many_requests_are_spread(both: Replicas) -> None:
    with ExitStack() as streams:
        for n in range(4):  # more would wait for blocks of the KV cache
            stream = streams.enter_context(both.complete(f"{n} is", **ENDLESS))
            next(iter(stream))
        assert sorted(both.metric("num_requests_running").values()) == [2, 2]
    both.wait_until_nothing_runs()


def test_a_client_that_goes_away_ends_its_request(both: Replicas) -> None:
    stream = both.complete("Once", **ENDLESS)
    next(iter(stream))
    assert sum(both.metric("num_requests_running").values()) == 1
    stream.close()
    both.wait_until_nothing_runs()


def test_requests_go_on_when_a_replica_is_killed(both: Replicas) -> None:
    options = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
    victim = both.actors()[0]
    streams = [both.complete(f"{name} is", **options) for name in ("One", "Two")]
    for stream in streams:
        next(iter(stream))
    assert sorted(both.metric("num_requests_running").values()) == [1, 1]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(both.complete, f"{n} and", max_tokens=16) for n in range(8)]
        victim.kill()
        for answer in answers:
            assert answer.result().choices[0].finish_reason == "length"
    ends = []
    for stream in streams:
        try:
            *_, last = stream
            ends.append(last.choices[0].finish_reason)
        except openai.APIError as error:
            ends.append(error.code)
        stream.close()
    assert sorted(ends) == ["length", "unavailable"]  # one had begun on the replica that died
    assert both.complete("Now").choices


def test_without_ray_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from fuserve.cli.main import main; "
        "sys.argv = ['fuserve', 'serve', '--model', 'demo', '--port', '0', '--replicas', '2']; "
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "pip install 'fuserve[ray]'" in result.stderr.splitlines()[-1]
