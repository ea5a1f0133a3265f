"""Clients that leave and steps that fail: the server goes on, and the others do not notice."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from fuserve.server.config import ServerConfig
from tests.engine.fake_model import FakeExecutor, Logits, hashed_logits
from tests.server.serving import WAIT_S, HeldExecutor, RunningServer, serving_toy

BODY: dict[str, Any] = {"model": "toy", "prompt": "hi", "max_tokens": 900}
POISON = ord("!")


def wait_for(condition: Callable[[], bool]) -> None:
    """Until the engine's thread has seen what this test's thread did."""
    deadline = threading.Event()
    timer = threading.Timer(WAIT_S, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set(), "it never happened"
    finally:
        timer.cancel()


def idle(server: RunningServer) -> bool:
    stats = server.engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{}, {"n": 3}, {"prompt": ["a", "b", "c"]}])
def test_a_client_that_leaves_cancels_its_request(stream: bool, body: dict[str, Any]) -> None:
    executor = HeldExecutor()
    with serving_toy(executor) as server:
        connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        request = httpx2.Request(
            "POST", f"{server.url}/v1/completions", json=BODY | body | {"stream": stream}
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        assert executor.stepping.wait(WAIT_S)
        connection.close()
        executor.released.set()
        wait_for(lambda: idle(server))
        assert len(executor.batches) < 900, "the request ran to its end"


def test_a_client_that_leaves_a_stream_half_read_cancels_it(toy: RunningServer) -> None:
    stream = toy.client().completions.create(stream=True, **BODY)
    for _ in range(3):
        next(stream)
    stream.close()
    wait_for(lambda: idle(toy))


def test_200_clients_that_leave_at_random_times_leave_nothing_behind() -> None:
    dice = random.Random(5)
    stays = [dice.randrange(6) for _ in range(200)]
    greedy: dict[str, Any] = {"model": "toy", "max_tokens": 6, "temperature": 0}

    async def visit(client: httpx2.AsyncClient, number: int) -> None:
        body = BODY | {"prompt": f"visitor {number}", "stream": True, "n": 1 + number % 2}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code in (200, 429)
            lines = response.aiter_lines()
            for _ in range(stays[number]):
                if await anext(lines, None) is None:
                    return

    async def stay(client: httpx2.AsyncClient) -> str:
        while True:
            response = await client.post("/v1/completions", json=greedy | {"prompt": "abcd"})
            if response.status_code == httpx2.codes.OK:
                return str(response.json()["choices"][0]["text"])

    async def crowd(server: RunningServer) -> list[str]:
        limits = httpx2.Limits(max_connections=None)
        options: dict[str, Any] = {"base_url": server.url, "timeout": WAIT_S, "limits": limits}
        async with httpx2.AsyncClient(**options) as client, asyncio.TaskGroup() as group:
            staying = [group.create_task(stay(client)) for _ in range(5)]
            for number in range(200):
                group.create_task(visit(client, number))
        return [task.result() for task in staying]

    with serving_toy() as server:
        expected = server.client().completions.create(prompt="abcd", **greedy).choices[0].text
        assert asyncio.run(crowd(server)) == [expected] * 5
        wait_for(lambda: idle(server))


def poisoned(history: Sequence[int]) -> Logits:
    """The answer to a prompt with "!" has NaN in its third row."""
    logits = hashed_logits(history)
    if POISON in history[:4] and len(history) > 6:
        logits[0] = np.nan
    return logits


def test_an_answer_that_fails_is_a_500_with_its_id_and_its_neighbour_is_untouched() -> None:
    options: dict[str, Any] = {"model": "toy", "max_tokens": 8, "temperature": 0}
    with serving_toy() as healthy:
        expected = healthy.client().completions.create(prompt="abcd", **options).choices[0].text
    with serving_toy(FakeExecutor(logits_of=poisoned)) as server:
        client = server.client()
        texts: list[str] = []
        neighbour = threading.Thread(
            target=lambda: texts.append(
                client.completions.create(prompt="abcd", **options).choices[0].text
            )
        )
        neighbour.start()
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(prompt="!", extra_headers={"x-request-id": "q1"}, **options)
        neighbour.join(WAIT_S)
        assert failed.value.status_code == 500
        assert "q1" in str(failed.value)
        assert texts == [expected]
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_stream_that_fails_late_ends_with_an_error_event() -> None:
    with serving_toy(FakeExecutor(logits_of=poisoned)) as server:
        stream = server.client().completions.create(
            model="toy", prompt="!", max_tokens=50, temperature=0, stream=True
        )
        with pytest.raises(openai.APIError) as failed:
            for _ in stream:
                pass
        assert failed.value.code == "internal_error"


class Interrupted(FakeExecutor):
    """Steps that hold the prompt of a victim fail."""

    def step(self, batch: Any) -> Any:
        if POISON in batch.tokens:
            raise RuntimeError("injected")
        return super().step(batch)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_a_500_with_an_id_and_the_server_goes_on(stream: bool) -> None:
    greedy: dict[str, Any] = {"model": "toy", "max_tokens": 5, "temperature": 0}
    with serving_toy(Interrupted()) as server:
        client = server.client()
        before = client.completions.create(prompt="abcd", **greedy).choices[0].text
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(
                prompt="!", stream=stream, extra_headers={"x-request-id": "q7"}, **greedy
            )
        assert failed.value.status_code == 500
        assert "q7" in str(failed.value)
        assert failed.value.request_id == "q7"
        with pytest.raises(openai.InternalServerError):
            client.embeddings.create(model="toy", input="!")
        after = client.completions.create(prompt="abcd", **greedy).choices[0].text
        assert after == before
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert idle(server)


def test_a_request_that_takes_too_long_ends_with_504() -> None:
    with serving_toy(config=ServerConfig(request_timeout_s=1e-6)) as server:
        with pytest.raises(openai.InternalServerError) as late:
            server.client().completions.create(**BODY)
        assert late.value.status_code == 504
        assert late.value.code == "deadline_exceeded"


def test_a_dead_engine_is_told_by_health_and_to_clients() -> None:
    class Deadly(FakeExecutor):
        def step(self, batch: Any) -> Any:
            raise SystemExit("the thread dies of this")

    with serving_toy(Deadly()) as server:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as dead:
                server.client().completions.create(**BODY)
            assert dead.value.status_code == 503
        for path in ("/health", "/ready"):
            response = httpx2.get(server.url + path)
            assert response.status_code == 503
            assert "died" in response.json()["reason"]
