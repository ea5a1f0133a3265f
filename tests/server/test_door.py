"""Who is let in, and how much at once."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from fuserve.engine.sampling_params import SamplingParams
from fuserve.server.api_keys import ApiKeys
from fuserve.server.config import ServerConfig
from tests.engine.driving import make_engine, run_together
from tests.engine.fake_model import FakeExecutor
from tests.server.serving import WAIT_S, HeldExecutor, RunningServer, serving_toy

BODY: dict[str, Any] = {"model": "toy", "prompt": "hi", "max_tokens": 3}


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    config = ServerConfig(
        api_keys=("first", "second"), cors_origins=("https://page.example",), max_body_bytes=2000
    )
    with serving_toy(config=config) as server:
        yield server


def test_keys_are_told_apart_without_being_shown() -> None:
    keys = ApiKeys(["first", "zweiter-schlüssel"])
    assert keys.client_of("Bearer first") == "key-0"
    assert keys.client_of("bearer  zweiter-schlüssel") == "key-1"
    for wrong in (None, "", "Bearer", "Bearer firs", "Basic first", "first", "Bearer \udcff"):
        assert keys.client_of(wrong) is None
    assert ApiKeys([]).client_of(None) == ""


def test_only_a_known_key_opens_the_api(locked: RunningServer) -> None:
    for key in ("first", "second"):
        assert locked.client(key).completions.create(**BODY).choices
    with pytest.raises(openai.AuthenticationError) as refused:
        locked.client("third").completions.create(**BODY)
    assert refused.value.code == "invalid_api_key"
    for path in ("/tokenize", "/detokenize", "/v1/embeddings", "/v1/chat/completions"):
        assert httpx2.post(locked.url + path, json={}).status_code == 401
    for path in ("/tokenizer_info", "/v1/models"):
        assert httpx2.get(locked.url + path).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/version", "/"):
        assert httpx2.get(locked.url + path).status_code == 200


def test_only_the_given_origin_may_call_from_a_page(
    locked: RunningServer, toy: RunningServer
) -> None:
    def preflight(server: RunningServer, origin: str) -> httpx2.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return httpx2.options(server.url + "/v1/chat/completions", headers=headers)

    allowed = preflight(locked, "https://page.example")
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in preflight(locked, "https://other.example").headers
    assert "access-control-allow-origin" not in preflight(toy, "https://page.example").headers


def test_a_large_body_is_refused_however_it_is_sent(locked: RunningServer) -> None:
    headers = {"authorization": "Bearer first", "content-type": "application/json"}
    body = b'{"prompt": "' + b"x" * 3000 + b'"}'

    def pieces() -> Iterator[bytes]:
        yield body[:1500]
        yield body[1500:]

    for content in (body, pieces()):
        response = httpx2.post(locked.url + "/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_a_full_queue_is_told_with_the_time_to_come_back() -> None:
    executor = HeldExecutor()
    with serving_toy(executor, max_num_seqs=1, max_queue_requests=1) as server:
        url = f"{server.url}/v1/completions"
        answers: list[httpx2.Response] = []

        def ask() -> None:
            answers.append(httpx2.post(url, json=BODY, timeout=WAIT_S))

        running = threading.Thread(target=ask)
        running.start()
        assert executor.stepping.wait(WAIT_S)
        waiting = threading.Thread(target=ask)
        waiting.start()
        while server.engine.stats().num_waiting == 0:
            pass
        refused = httpx2.post(url, json=BODY, timeout=WAIT_S)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        executor.released.set()
        running.join(WAIT_S)
        waiting.join(WAIT_S)
        assert [answer.status_code for answer in answers] == [200, 200]


def flood_body(number: int) -> dict[str, Any]:
    """A prompt of its own; every second answer is streamed."""
    prompt = [number % 256, number // 256, 7]
    return BODY | {"prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": number % 2 == 0}


async def text_of(response: httpx2.Response, *, streamed: bool) -> str:
    if not streamed:
        return str(response.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def flood(server: RunningServer) -> list[tuple[int, str]]:
    """500 requests at once: their statuses, and their texts or when to come back."""

    async def ask(number: int) -> tuple[int, str]:
        body = flood_body(number)
        response = await client.post("/v1/completions", json=body)
        if response.status_code != httpx2.codes.OK:
            return response.status_code, response.headers["retry-after"]
        return 200, await text_of(response, streamed=body["stream"])

    limits = httpx2.Limits(max_connections=None)
    options: dict[str, Any] = {"base_url": server.url, "timeout": WAIT_S, "limits": limits}
    async with httpx2.AsyncClient(**options) as client:
        return await asyncio.gather(*(ask(number) for number in range(500)))


class Forgetful(FakeExecutor):
    """Keeps no list of what it did."""

    def step(self, batch: Any) -> Any:
        logits = super().step(batch)
        self.batches.clear()
        return logits


def num_engine_objects() -> int:
    """Objects of the engine's classes; connections, which close when they like, have none."""
    gc.collect()
    modules = (str(type(one).__module__) for one in gc.get_objects())
    return sum(module.startswith("fuserve.engine") for module in modules)


def test_a_flood_is_answered_to_the_last_request_and_nothing_leaks() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=4)
    jobs = [(flood_body(number)["prompt"], greedy) for number in range(500)]
    expected = [output.outputs[0].text for output in run_together(make_engine(), jobs)]
    with serving_toy(Forgetful(), max_queue_requests=64) as server:
        free = server.engine.stats().num_free_blocks
        num_objects = []
        for _ in range(2):
            answers = asyncio.run(flood(server))
            assert {status for status, _ in answers} <= {200, 429}
            assert sum(status == 200 for status, _ in answers) >= 64
            for (status, text), own in zip(answers, expected, strict=True):
                assert text == own if status == 200 else int(text) >= 1
            stats = server.engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert stats.num_free_blocks == free
            del answers
            num_objects.append(num_engine_objects())
        assert num_objects[1] - num_objects[0] < 50, "something of every request is kept"
