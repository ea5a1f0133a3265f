"""``fuserve serve`` as a process: it starts, answers, and leaves without cutting anybody off."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import httpx2
import openai
import psutil
import pytest
from openai import OpenAI

from tests.server.serving import WAIT_S, served


def open_stream(url: str, **options: Any) -> Any:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
    stream = client.completions.create(
        model="demo",
        prompt="Once upon a time",
        stream=True,
        extra_body={"ignore_eos": True},
        **options,
    )
    next(stream)
    return stream


def test_sigterm_lets_a_stream_end_and_refuses_new_requests() -> None:
    with served("--grace-period", "50") as (process, url):
        assert httpx2.get(f"{url}/ready").status_code == 200
        stream = open_stream(url, max_tokens=400)
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{url}/ready").status_code == 200:
            pass
        assert httpx2.get(f"{url}/health").status_code == 200
        refused = httpx2.post(f"{url}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert process.wait(WAIT_S) == 0


def test_what_outlasts_the_grace_period_is_ended_with_an_error() -> None:
    with served("--grace-period", "0.01") as (process, url):
        stream = open_stream(url, max_tokens=1900)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError) as ended:
            for _ in stream:
                pass
        assert ended.value.code == "unavailable"
        assert process.wait(WAIT_S) == 0


def test_an_idle_server_exits_at_once_and_its_log_is_json() -> None:
    with served() as (process, url):
        assert httpx2.get(f"{url}/").status_code == 200
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith('{"time')]
        assert {entry["event"] for entry in entries} == {"request", "draining"}


def test_a_server_under_load_has_the_threads_of_an_idle_one() -> None:
    with served() as (process, url):
        threads = psutil.Process(process.pid).num_threads()
        httpx2.get(f"{url}/app.js")
        long_text = "word " * 3000  # tokenized beside the event loop

        async def ask() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(base_url=url, timeout=WAIT_S) as http:
                guided = [
                    {"prompt": "hi", "max_tokens": 4, "guided_regex": f"[a-z]{{{n}}}"}
                    for n in range(1, 9)
                ]
                return await asyncio.gather(
                    *(http.post("/v1/completions", json=body) for body in guided),
                    *(http.post("/tokenize", json={"prompt": long_text}) for _ in range(8)),
                )

        assert {response.status_code for response in asyncio.run(ask())} == {200}
        assert psutil.Process(process.pid).num_threads() == threads
