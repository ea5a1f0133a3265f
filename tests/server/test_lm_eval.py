"""The requests of lm-eval's local-completions, as version 0.4.13 writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.server.serving import RunningServer

QUESTION, ANSWERS = "The capital of France is", (" Paris", " Seventeen bananas")


@pytest.fixture
def http(demo: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=demo.url, timeout=60) as client:
        yield client


def encode(http: httpx2.Client, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    tokens: list[int] = http.post("/tokenize", json=body).json()["tokens"]
    return tokens


def scored(http: httpx2.Client, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    body = {
        "model": "demo",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = http.post("/v1/completions", json=body | options)
    assert answer.status_code == 200, answer.text
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    return [choice["logprobs"] for choice in choices]


def test_the_server_can_tokenize_for_it(http: httpx2.Client) -> None:
    info = http.get("/tokenizer_info").json()
    (eos,) = encode(http, info["eos_token"])
    assert http.post("/detokenize", json={"tokens": [eos]}).json() == {"prompt": info["eos_token"]}
    assert "messages" in info["chat_template"]


def test_log_likelihoods_are_those_of_the_prompt_without_the_token_behind_it(
    http: httpx2.Client,
) -> None:
    context = encode(http, QUESTION)
    prompts = [context + encode(http, answer) for answer in ANSWERS]
    sums, are_greedy = [], []
    for prompt, logprobs in zip(prompts, scored(http, prompts), strict=True):
        chosen = logprobs["token_logprobs"][len(context) : -1]
        tops = logprobs["top_logprobs"][len(context) : -1]
        assert len(chosen) == len(tops) == len(prompt) - len(context)
        sums.append(sum(chosen))
        are_greedy.append(
            all(one == max(top.values()) for one, top in zip(chosen, tops, strict=True))
        )
    assert sums[0] > sums[1] + 5
    assert are_greedy == [True, False]


def test_an_end_behind_the_prompt_is_a_token_of_the_answer(http: httpx2.Client) -> None:
    (eos,) = encode(http, http.get("/tokenizer_info").json()["eos_token"])
    context = encode(http, QUESTION)
    (plain,) = scored(http, [context])
    (ended,) = scored(http, [context], logit_bias={str(eos): 100})
    assert len(ended["token_logprobs"]) == len(plain["token_logprobs"]) == len(context) + 1
    assert ended["token_logprobs"][:-1] == plain["token_logprobs"][:-1]


def test_texts_are_generated_until_a_stop(http: httpx2.Client) -> None:
    body = {
        "prompt": [encode(http, "1, 2, 3, 4, 5,")],
        "model": "demo",
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["8", http.get("/tokenizer_info").json()["eos_token"]],
        "seed": 1234,
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == " 6, 7, "
