"""Users of every kind: they stream, leave in the middle, ask for the impossible, come in crowds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.loadgen import Answer, Completer, PlannedRequest, Target, Vocabulary
from fuserve.loadgen.client import clock_s

from .batches import GREEDY
from .servers import RunningServer

NUM_USERS = 12
CROWD = 100  # more than run and wait together, so that some are told to come later
LONGEST_PROMPT, LONGEST_ANSWER = 384, 96
SHARED_TOKENS = 128
FILLING_TOKENS = 704
TIMEOUT_S = 120.0

Visit = Callable[["Crowd", np.random.Generator], Awaitable[str]]


@dataclass
class Crowd:
    """The users of one server, and what has come of their visits: kind and outcome, counted."""

    server: RunningServer
    completer: Completer
    http: httpx2.AsyncClient
    vocabulary: Vocabulary
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def request(self, rng: np.random.Generator, *, prefix_tokens: int = 0) -> PlannedRequest:
        """A prompt of random tokens after a beginning that all users share."""
        shared = self.vocabulary.draw(np.random.default_rng(0), prefix_tokens)
        own = self.vocabulary.draw(rng, int(rng.integers(4, LONGEST_PROMPT)))
        prompt = self.vocabulary.prompt([*shared, *own])
        return PlannedRequest(0.0, prompt, int(rng.integers(1, LONGEST_ANSWER)))

    @property
    def failures(self) -> dict[str, int]:
        """Outcomes that must not be."""
        return {f"{kind}: {how}": n for (kind, how), n in self.outcomes.items() if how != "ok"}


async def fill_cache(server: RunningServer) -> None:
    """Use every block of the KV cache once: memory that is committed when first used, and stays."""
    num_blocks = round(server.metrics()["fuserve:kv_cache_blocks", ""])
    count = num_blocks * BLOCK_SIZE_TOKENS // FILLING_TOKENS + 2
    async with Completer(Target(server.base_url, server.model, body=GREEDY)) as completer:
        vocabulary = await completer.vocabulary()
        for number in range(count):
            tokens = vocabulary.draw(np.random.default_rng([count, number]), FILLING_TOKENS)
            answer = await completer.complete(
                PlannedRequest(0.0, vocabulary.prompt(tokens), 1), clock_s()
            )
            if answer.error:
                raise SystemExit(f"the cache could not be filled: {answer.error}")


async def run_users(server: RunningServer, seconds: float, seed: int = 0) -> Crowd:
    """Let users come and go for a while; each does one thing after the other."""
    target = Target(server.base_url, server.model, body=GREEDY)
    base_url = server.base_url
    async with (
        Completer(target) as completer,
        httpx2.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, trust_env=False) as http,
    ):
        crowd = Crowd(server, completer, http, await completer.vocabulary())
        deadline_s = clock_s() + seconds
        async with asyncio.TaskGroup() as group:
            for user in range(NUM_USERS):
                group.create_task(_user(crowd, np.random.default_rng([seed, user]), deadline_s))
        return crowd


async def _user(crowd: Crowd, rng: np.random.Generator, deadline_s: float) -> None:
    names = list(VISITS)
    weights = np.array([weight for _, weight in VISITS.values()])
    while clock_s() < deadline_s:
        name = names[rng.choice(len(names), p=weights / weights.sum())]
        visit, _ = VISITS[name]
        crowd.outcomes[name, await visit(crowd, rng)] += 1


async def _stream(crowd: Crowd, rng: np.random.Generator) -> str:
    answer = await crowd.completer.complete(crowd.request(rng), clock_s())
    return _outcome(answer)


async def _share_a_prefix(crowd: Crowd, rng: np.random.Generator) -> str:
    request = crowd.request(rng, prefix_tokens=SHARED_TOKENS)
    return _outcome(await crowd.completer.complete(request, clock_s()))


async def _leave(crowd: Crowd, rng: np.random.Generator) -> str:
    """Close the connection after some chunks."""
    num_chunks = int(rng.integers(1, 20))

    def leave(answer: Answer) -> None:
        if len(answer.chunk_s) >= num_chunks:
            task.cancel()

    task = asyncio.create_task(crowd.completer.complete(crowd.request(rng), clock_s(), leave))
    try:
        return _outcome(await task)  # it was shorter
    except asyncio.CancelledError:
        return "ok"


async def _come_in_a_crowd(crowd: Crowd, rng: np.random.Generator) -> str:
    requests = [PlannedRequest(0.0, crowd.request(rng).prompt, 1) for _ in range(CROWD)]
    now_s = clock_s()
    answers = await asyncio.gather(*(crowd.completer.complete(r, now_s) for r in requests))
    return next((found for a in answers if (found := _outcome(a)) != "ok"), "ok")


async def _ask_twice_at_once(crowd: Crowd, rng: np.random.Generator) -> str:
    body = {"prompt": crowd.request(rng).prompt, "n": 2, "max_tokens": 16, "temperature": 1.0}
    return await _post(crowd, "/v1/completions", body, 200)


async def _want_json(crowd: Crowd, rng: np.random.Generator) -> str:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": f"Describe city {rng.integers(1000)}."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        "max_tokens": 48,
    }
    return await _post(crowd, "/v1/chat/completions", body, 200)


async def _embed(crowd: Crowd, rng: np.random.Generator) -> str:
    return await _post(crowd, "/v1/embeddings", {"input": crowd.request(rng).prompt}, 200)


async def _ask_for_the_impossible(crowd: Crowd, rng: np.random.Generator) -> str:
    wrong: list[dict[str, Any]] = [
        {"prompt": "hello " * 2000},  # longer than the model's context in a soak
        {"prompt": "hello", "temperature": -1},
        {"prompt": "hello", "guided_regex": "("},
        {"prompt": []},
    ]
    return await _post(crowd, "/v1/completions", wrong[rng.integers(len(wrong))], 400)


VISITS: dict[str, tuple[Visit, float]] = {
    "stream": (_stream, 8),
    "share a prefix": (_share_a_prefix, 4),
    "leave": (_leave, 4),
    "two at once": (_ask_twice_at_once, 2),
    "json": (_want_json, 2),
    "embed": (_embed, 2),
    "impossible": (_ask_for_the_impossible, 2),
    "crowd": (_come_in_a_crowd, 0.1),
}


async def _post(crowd: Crowd, path: str, body: dict[str, Any], wanted_status: int) -> str:
    try:
        response = await crowd.http.post(path, json={"model": crowd.server.model, **body})
    except httpx2.HTTPError as error:
        return type(error).__name__
    allowed = (wanted_status, httpx2.codes.TOO_MANY_REQUESTS)
    return "ok" if response.status_code in allowed else f"status {response.status_code}"


def _outcome(answer: Answer) -> str:
    """A refusal for lack of room is as good as an answer."""
    kind = answer.error.partition(":")[0]
    return "ok" if kind in ("", "429") else kind
