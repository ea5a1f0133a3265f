"""Who is let in, and how much at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from fuserve.server.api_keys import ApiKeys
from fuserve.server.config import ServerConfig
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
    assert httpx2.get(locked.url + "/v1/models").status_code == 401
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


def test_a_flood_is_answered_to_the_last_request_and_nothing_leaks() -> None:
    with serving_toy(max_queue_requests=64) as server:
        free = server.engine.stats().num_free_blocks

        async def ask(client: httpx2.AsyncClient, number: int) -> tuple[int, str]:
            prompt = [number % 256, number // 256, 7]
            body = BODY | {"prompt": prompt, "max_tokens": 4, "temperature": 0}
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 429:
                return 429, response.headers["retry-after"]
            return response.status_code, response.json()["choices"][0]["text"]

        async def flood() -> list[tuple[int, str]]:
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(
                base_url=server.url, timeout=WAIT_S, limits=limits
            ) as client:
                return await asyncio.gather(*(ask(client, number) for number in range(500)))

        answers = asyncio.run(flood())
        assert {status for status, _ in answers} <= {200, 429}
        assert sum(status == 200 for status, _ in answers) >= 64
        for number, (status, text) in enumerate(answers):
            if status == 200 and number % 50 == 0:  # no answer of somebody else
                assert asyncio.run(alone(server, number)) == text
        stats = server.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == free


async def alone(server: RunningServer, number: int) -> str:
    async with httpx2.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        body = BODY | {"prompt": [number % 256, number // 256, 7], "max_tokens": 4}
        response = await client.post("/v1/completions", json=body | {"temperature": 0})
        return str(response.json()["choices"][0]["text"])
