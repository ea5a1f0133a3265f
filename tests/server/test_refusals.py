"""What is wrong with a request is said in OpenAI's shape, with the right status and field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from tests.server.serving import WAIT_S, RunningServer

CHAT: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"model": "toy", "prompt": "hi"}
SHORT = {"max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def http(toy: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=toy.url, timeout=WAIT_S) as client:
        yield client


def refusal(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "guided_regex": "(",
            },
            "guided_regex",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        (
            {"stream": True, "stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 0.1}, "temprature"),
        ({"functions": []}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ],
)
def test_a_bad_field_of_chat_is_named(
    http: httpx2.Client, change: dict[str, Any], param: str
) -> None:
    error = refusal(http.post("/v1/chat/completions", json=CHAT | SHORT | change), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, None),  # a beginning-of-text token makes it one
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "x" * 2000}, "prompt"),
        ({"prompt": ["a", "x" * 2000]}, "prompt[1]"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_field_of_completions_is_named(
    http: httpx2.Client, change: dict[str, Any], param: str | None
) -> None:
    response = http.post("/v1/completions", json=PLAIN | SHORT | change)
    if param is None:
        assert response.status_code == 200
    else:
        assert refusal(response, 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_field_that_nobody_knows_is_refused_as_openai_does(
    http: httpx2.Client, path: str
) -> None:
    error = refusal(http.post(path, json=CHAT | PLAIN | {"input": "hi", "flux": 1.21}), 400)
    assert error["code"] == "unknown_parameter"
    assert error["message"].startswith("Unknown parameter: '")


def test_a_missing_field_is_named(http: httpx2.Client) -> None:
    error = refusal(http.post("/v1/chat/completions", json={"model": "toy"}), 400)
    assert error["param"] == "messages"


def test_a_prompt_that_never_fits_is_refused_with_its_code(http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json=PLAIN | {"prompt": "x" * 5000})
    error = refusal(response, 400)
    assert error["code"] == "context_length_exceeded"
    assert "5001" in error["message"]


def test_an_unsupported_schema_keyword_is_named_and_nothing_is_generated(
    http: httpx2.Client,
) -> None:
    schema = {"type": "array", "uniqueItems": True}
    body = CHAT | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    }
    error = refusal(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "response_format"
    assert "uniqueItems" in error["message"]


def test_embeddings_of_a_wrong_size_or_too_long_are_refused(http: httpx2.Client) -> None:
    body = {"model": "toy", "input": "hi"}
    assert refusal(http.post("/v1/embeddings", json=body | {"dimensions": 3}), 400)["param"] == (
        "dimensions"
    )
    long = body | {"input": "x" * 5000}
    assert refusal(http.post("/v1/embeddings", json=long), 400)["param"] == "input"
    other = body | {"encoding_format": "hex"}
    assert refusal(http.post("/v1/embeddings", json=other), 400)["param"] == "encoding_format"


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[]", b'"text"', b"\xff\xfe", b'{"messages": NaN}'],
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx2.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    refusal(http.post("/v1/chat/completions", content=body, headers=headers), 400)


def test_another_model_and_another_path_are_not_found(http: httpx2.Client) -> None:
    error = refusal(http.post("/v1/chat/completions", json=CHAT | {"model": "gpt-9"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    refusal(http.get("/v1/models/gpt-9"), 404)
    for response in (http.get("/v1/nothing"), http.post("/v1/nothing", json={}), http.get("/x.js")):
        assert refusal(response, 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("POST", "/v1/models"), ("PUT", "/")]
)
def test_a_wrong_method_is_told_as_such(http: httpx2.Client, method: str, path: str) -> None:
    error = refusal(http.request(method, path), 405)
    assert error["code"] == "method_not_supported"
    assert error["message"] == f"Not allowed to {method} on {path}."


def test_the_client_raises_its_own_exceptions(toy: RunningServer) -> None:
    client = toy.client()
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="toy", prompt="hi", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")


def test_tokens_go_to_text_and_back(http: httpx2.Client) -> None:
    encoded = http.post("/tokenize", json={"prompt": "héé", "return_token_strs": True}).json()
    assert encoded["count"] == len(encoded["tokens"]) == len(encoded["token_strs"])
    assert encoded["max_model_len"] == 1024
    text = http.post("/detokenize", json={"tokens": encoded["tokens"]}).json()
    assert text == {"prompt": "^héé"}
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()
    assert bytes(chat["tokens"]) == b"^user: hi?"
    refusal(http.post("/tokenize", json={}), 400)
    refusal(http.post("/detokenize", json={"tokens": [-1]}), 400)


def test_a_request_id_is_taken_over_or_drawn(http: httpx2.Client) -> None:
    given = http.get("/version", headers={"x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    drawn = http.get("/version", headers={"x-request-id": "x" * 500})
    assert len(drawn.headers["x-request-id"]) == 32
