"""The official client, unmodified, against the demo model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.server.serving import WAIT_S, RunningServer

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
COLOURS = ("red", "blue")
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def client(demo: RunningServer) -> OpenAI:
    return demo.client()


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "smol"]
    assert client.models.retrieve("smol").owned_by == "fuserve"


def test_a_question_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, max_completion_tokens=24, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_same_answer_and_its_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=QUESTION, max_tokens=24, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert whole.usage is not None
    last = chunks[-1].usage
    assert last is not None
    assert last.completion_tokens == whole.usage.completion_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_async_client_runs_requests_together(demo: RunningServer) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", timeout=WAIT_S) as client:

            async def streamed(number: int) -> str:
                stream = await client.completions.create(
                    prompt=f"{number} plus one is", max_tokens=8, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(number: int) -> str:
                answer = await client.completions.create(
                    prompt=f"{number} plus one is", max_tokens=8, **GREEDY
                )
                return answer.choices[0].text

            return await asyncio.gather(
                *(streamed(number) for number in range(6)), *(whole(number) for number in range(6))
            )

    answers = asyncio.run(ask())
    assert answers[:6] == answers[6:]


def test_the_async_client_gets_what_the_sync_client_gets_of_every_endpoint(
    client: OpenAI, demo: RunningServer
) -> None:
    chat: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, **GREEDY}
    plain: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, **GREEDY}
    inputs: dict[str, Any] = {"model": "demo", "input": ["one", "two"]}

    async def answers() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", timeout=WAIT_S) as own:
            models = [model.id async for model in own.models.list()]
            model = await own.models.retrieve("smol")
            answer = await own.chat.completions.create(**chat)
            chunks = [c async for c in await own.chat.completions.create(stream=True, **chat)]
            completion = await own.completions.create(**plain)
            pieces = [c async for c in await own.completions.create(stream=True, **plain)]
            vectors = await own.embeddings.create(**inputs)
        return [
            models,
            model.id,
            answer.choices[0].message.content,
            text_of(chunks),
            completion.choices[0].text,
            "".join(choice.text for piece in pieces for choice in piece.choices),
            [item.embedding for item in vectors.data],
        ]

    answer = client.chat.completions.create(**chat).choices[0].message.content
    text = client.completions.create(**plain).choices[0].text
    assert answer and text
    assert asyncio.run(answers()) == [
        [model.id for model in client.models.list()],
        client.models.retrieve("smol").id,
        answer,
        answer,
        text,
        text,
        [item.embedding for item in client.embeddings.create(**inputs).data],
    ]


def test_seeded_choices_repeat_and_differ_from_each_other(client: OpenAI) -> None:
    def choices() -> list[str]:
        answer = client.completions.create(
            model="demo", prompt=PROMPT, n=3, seed=7, temperature=1.5, max_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = choices()
    assert first == choices()
    assert len(set(first)) == 3


def test_n_streams_are_told_apart(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "messages": QUESTION,
        "n": 2,
        "seed": 3,
        "max_tokens": 8,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.message.content


def test_a_stop_string_ends_the_answer(client: OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=40, stop=["Paris"], **GREEDY)
    assert "Paris" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_max_completion_tokens_wins_over_max_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=QUESTION, max_completion_tokens=3, max_tokens=9, **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_a_bias_of_100_decides_the_token(client: OpenAI) -> None:
    token = 9  # any
    answer = client.completions.create(
        prompt=PROMPT, max_tokens=2, logit_bias={str(token): 100}, logprobs=0, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(set(logprobs.tokens)) == 1


def test_penalties_change_a_repetitive_answer(client: OpenAI) -> None:
    prompt = "la la la la la la la la la la"
    plain = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
    varied = client.completions.create(
        prompt=prompt, max_tokens=12, presence_penalty=2, frequency_penalty=2, **GREEDY
    )
    assert plain.choices[0].text != varied.choices[0].text


def test_chat_logprobs_hold_the_likeliest_alternatives(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert (
        "".join(token.token for token in logprobs.content).strip()
        == (answer.choices[0].message.content or "").strip()
    )
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
        assert bytes(token.bytes or []).decode() == token.token


FACE = "🤦🏽\u200d♀️"  # five characters, most of them over several tokens


def test_the_bytes_of_tokens_that_split_a_character_join_to_the_text(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "messages": QUESTION,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"guided_choice": [FACE]},
        **GREEDY,
    }
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == FACE
    assert whole.choices[0].logprobs is not None
    tokens = whole.choices[0].logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == FACE
    assert any(token.token.startswith("\\x") for token in tokens)
    streamed = [
        token
        for chunk in client.chat.completions.create(stream=True, **options)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert streamed == tokens


def test_offsets_of_plain_completions_count_whole_characters(client: OpenAI) -> None:
    answer = client.completions.create(
        prompt=PROMPT, logprobs=2, extra_body={"guided_choice": [f"{FACE}!"]}, **GREEDY
    )
    (choice,) = answer.choices
    assert choice.text == f"{FACE}!"
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert offsets[tokens.index("!")] == len(FACE)
    assert offsets == sorted(offsets)
    assert any(token.startswith("bytes:\\x") for token in tokens)


def test_streamed_logprobs_are_those_of_the_whole(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "messages": QUESTION,
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 1,
        **GREEDY,
    }
    whole = client.chat.completions.create(**options)
    streamed = [
        token
        for chunk in client.chat.completions.create(stream=True, **options)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content


def test_several_prompts_get_their_choices_in_order(client: OpenAI) -> None:
    prompts = [PROMPT, "Two plus two equals"]
    together = client.completions.create(prompt=prompts, max_tokens=5, **GREEDY)
    apart = [client.completions.create(prompt=p, max_tokens=5, **GREEDY) for p in prompts]
    assert [choice.index for choice in together.choices] == [0, 1]
    assert [c.text for c in together.choices] == [answer.choices[0].text for answer in apart]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, max_tokens=5, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in together.choices]


def test_a_prompt_of_token_ids_is_the_same_prompt(client: OpenAI, demo: RunningServer) -> None:
    ids = client.post("/../tokenize", body={"prompt": PROMPT}, cast_to=object)
    assert isinstance(ids, dict)
    by_ids = client.completions.create(prompt=ids["tokens"], max_tokens=5, **GREEDY)
    by_text = client.completions.create(prompt=PROMPT, max_tokens=5, **GREEDY)
    assert by_ids.choices[0].text == by_text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt_without_an_answer(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 2}
    if stream:
        (answer,) = client.completions.create(stream=True, **options, **GREEDY)
    else:
        answer = client.completions.create(**options, **GREEDY)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
    (choice,) = answer.choices
    assert choice.text == PROMPT
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert [PROMPT[offset:][0] for offset in logprobs.text_offset] == [
        token[0] for token in logprobs.tokens
    ]
    assert all(len(top) >= 2 for top in logprobs.top_logprobs[1:])


def test_echo_scores_the_prompt_of_every_choice_streamed_or_not(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "prompt": [PROMPT, "Two plus"],
        "n": 2,
        "seed": 5,
        "max_tokens": 3,
        "echo": True,
        "logprobs": 1,
    }
    whole = client.completions.create(**options)
    streamed: list[dict[str, Any]] = [
        {"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for _ in whole.choices
    ]
    for chunk in client.completions.create(stream=True, **options):
        (choice,) = chunk.choices
        streamed[choice.index]["text"] += choice.text
        if choice.logprobs is not None:
            for name, values in choice.logprobs.model_dump().items():
                streamed[choice.index][name] += values
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert streamed[choice.index] == {"text": choice.text, **choice.logprobs.model_dump()}
        lengths = {len(values) for values in choice.logprobs.model_dump().values()}
        assert len(lengths) == 1


def test_the_best_of_several_has_the_highest_log_probability_per_token(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "seed": 4, "max_tokens": 6}
    drawn = client.completions.create(n=5, logprobs=0, temperature=1.3, **options)

    def score(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(drawn.choices, key=score, reverse=True)
    best = client.completions.create(n=2, best_of=5, temperature=1.3, **options)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert drawn.usage is not None and best.usage is not None
    assert best.usage.completion_tokens == drawn.usage.completion_tokens


def test_echo_puts_the_prompt_before_the_answer(client: OpenAI) -> None:
    plain = client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY)
    echoed = client.completions.create(prompt=PROMPT, max_tokens=4, echo=True, **GREEDY)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_vectors_of_length_one(client: OpenAI, pooling: str) -> None:
    texts = ["A cat sat.", "A dog sat.", "Stocks fell sharply."]
    extra = {"pooling": pooling}
    packed = client.embeddings.create(model="demo", input=texts, extra_body=extra)  # base64
    plain = client.embeddings.create(
        model="demo", input=texts, encoding_format="float", extra_body=extra
    )
    vectors = np.array([item.embedding for item in packed.data])
    assert vectors.shape[0] == 3
    np.testing.assert_allclose(vectors, [item.embedding for item in plain.data], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


@pytest.mark.parametrize("seed", range(2))
def test_an_answer_is_json_where_json_is_asked_for(client: OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        response_format={"type": "json_object"},
        seed=seed,
        model="demo",
        temperature=0.5,
        max_tokens=700,
        logit_bias={"109": 100, "23597": 100, "18": 20},  # "}" and its like: small models go on
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_an_answer_follows_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
        max_tokens=120,
        **GREEDY,
    )
    content = json.loads(answer.choices[0].message.content or "")
    assert set(content) == {"city", "people"}
    assert isinstance(content["people"], int)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("guided_choice", ["yes", "no"], {"yes", "no"}),
        (
            "guided_regex",
            "(red|blue)[0-9]",
            {f"{c}{i}" for c in ("red", "blue") for i in range(10)},
        ),
        ("guided_grammar", 'start: "left" | "right"', {"left", "right"}),
        ("guided_json", {"enum": ["a", "b"]}, {'"a"', '"b"'}),
    ],
)
def test_vllms_guided_fields_constrain_completions(
    client: OpenAI, field: str, value: object, allowed: set[str]
) -> None:
    answer = client.completions.create(
        prompt="Answer:", max_tokens=20, extra_body={field: value}, **GREEDY
    )
    assert answer.choices[0].text in allowed
    assert answer.choices[0].finish_reason == "stop"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}


def test_a_required_call_comes_whole(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        **GREEDY,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_streamed_calls_are_those_of_the_whole(client: OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 100,
        **GREEDY,
    }
    whole = client.chat.completions.create(**options)
    (call,) = whole.choices[0].message.tool_calls
    name, arguments, reason, pieces = "", "", None, 0
    for chunk in client.chat.completions.create(stream=True, **options):
        reason = chunk.choices[0].finish_reason or reason
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
            pieces += 1
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert reason == whole.choices[0].finish_reason
    assert pieces > 2
    json.loads(arguments)


def test_a_conversation_with_tool_results_is_taken(client: OpenAI) -> None:
    called = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    answer = client.chat.completions.create(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather in Paris?"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "user", "content": "Thanks!"},
        ],
        tools=[WEATHER],
        max_tokens=4,
        **GREEDY,
    )
    assert answer.choices[0].message.tool_calls is None


def test_fields_that_openai_knows_and_that_mean_nothing_here_are_taken(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=QUESTION,
        max_tokens=1,
        user="ann",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        modalities=["text"],
        **GREEDY,
    )
    assert answer.choices
