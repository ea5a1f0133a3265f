"""Loading a server: what is sent, when, and what is made of the answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fuserve.errors import InvalidRequestError
from fuserve.loadgen import Completer, PlannedRequest, Run, ServingReport, Target, drive, summarize
from fuserve.loadgen.client import EndpointKind, find_model
from tests.loadgen.fake_openai import WAIT_S, FakeOpenAI, count_up


def requests(count: int, output_tokens: int = 4) -> list[PlannedRequest]:
    return [PlannedRequest(0.0, [7, 8, 9], output_tokens) for _ in range(count)]


def run(
    fake: FakeOpenAI,
    planned: list[PlannedRequest],
    *,
    endpoint: EndpointKind = "completions",
    max_concurrency: int | None = None,
) -> Run:
    async def main() -> Run:
        target = Target(fake.url, "fake", "secret", endpoint, {"ignore_eos": True})
        async with Completer(target) as completer:
            return await drive(completer, planned, max_concurrency=max_concurrency)

    return asyncio.run(main())


def report(fake: FakeOpenAI, planned: list[PlannedRequest], **options: Any) -> ServingReport:
    with fake.serving():
        return summarize(run(fake, planned, **options))


def test_tokens_are_counted_as_the_server_tells_them() -> None:
    result = report(FakeOpenAI(), requests(3))
    assert (result.num_completed, result.output_tokens, result.prompt_tokens) == (3, 12, 9)
    assert result.output_tokens_counted == "usage"
    assert result.output_tokens_per_s == pytest.approx(12 / result.duration_s)


def test_without_usage_the_chunks_are_counted() -> None:
    result = report(FakeOpenAI(sends_usage=False), requests(2))
    assert (result.output_tokens, result.prompt_tokens) == (8, None)
    assert result.output_tokens_counted == "chunks"


def test_a_chat_is_sent_as_a_message_and_the_key_as_a_bearer_token() -> None:
    fake = FakeOpenAI()
    result = report(fake, [PlannedRequest(0.0, "how are you", 2)], endpoint="chat")
    assert result.output_tokens == 2
    (body,) = fake.bodies
    assert body["messages"] == [{"role": "user", "content": "how are you"}]
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (2, True, True)
    assert fake.headers[0]["authorization"] == "Bearer secret"


def test_requests_are_sent_whether_or_not_earlier_ones_were_answered() -> None:
    everyone = threading.Barrier(20)

    def reply(body: dict[str, Any]) -> Iterator[str]:
        everyone.wait(WAIT_S)  # nobody is answered before all have asked
        yield from count_up(body)

    result = report(FakeOpenAI(reply=reply), requests(20))
    assert (result.num_completed, result.peak_concurrency) == (20, 20)


def test_a_limit_of_concurrency_is_kept() -> None:
    running = threading.Semaphore(3)

    def reply(body: dict[str, Any]) -> Iterator[str]:
        assert running.acquire(blocking=False), "more than three at once"
        yield from count_up(body)
        running.release()

    result = report(FakeOpenAI(reply=reply), requests(12), max_concurrency=3)
    assert (result.num_completed, result.errors) == (12, {})
    assert result.peak_concurrency <= 3


def test_five_hundred_streams_at_once_are_all_answered() -> None:
    result = report(FakeOpenAI(), requests(500))
    assert (result.num_completed, result.errors, result.output_tokens) == (500, {}, 2000)


def test_refusals_are_counted_by_status_and_do_not_spoil_the_rest() -> None:
    turns = iter(range(6))
    fake = FakeOpenAI(refuse=lambda body: (429, "queue full") if next(turns) % 3 == 0 else None)
    with fake.serving():
        result = run(fake, requests(6), max_concurrency=1)
    assert [answer.error for answer in result.answers] == ["429: queue full", "", ""] * 2
    assert summarize(result).errors == {"429": 2}
    assert summarize(result).num_completed == 4


def test_a_stream_that_fails_or_breaks_off_is_no_success() -> None:
    assert report(FakeOpenAI(fails_in_stream="NaN"), requests(1)).errors == {"in stream": 1}

    def break_off(body: dict[str, Any]) -> Iterator[str]:
        yield "one"
        raise ConnectionError

    (error,) = report(FakeOpenAI(reply=break_off), requests(1)).errors
    assert error in ("RemoteProtocolError", "ReadError")


def test_a_server_that_is_not_there_is_counted_and_named() -> None:
    with FakeOpenAI().serving() as fake:
        pass
    (error,) = summarize(run(fake, requests(1))).errors
    assert error == "ConnectError"
    with pytest.raises(InvalidRequestError, match=fake.url):
        asyncio.run(find_model(fake.url, ""))


def vocabulary_of(fake: FakeOpenAI, endpoint: EndpointKind = "completions") -> tuple[int, ...]:
    async def main() -> tuple[int, ...]:
        async with Completer(Target(fake.url, "fake", endpoint=endpoint)) as completer:
            return (await completer.vocabulary()).token_ids

    with fake.serving():
        return asyncio.run(main())


@pytest.mark.parametrize(
    "tokenizes", [("/tokenize", "prompt"), ("/tokenize", "content"), ("/extras/tokenize", "input")]
)
def test_prompts_are_token_ids_where_the_server_tells_them(tokenizes: tuple[str, str]) -> None:
    token_ids = vocabulary_of(FakeOpenAI(tokenizes=tokenizes))
    assert len(token_ids) > 200
    assert 100 not in token_ids  # the first may be a special token


def test_prompts_are_texts_where_it_does_not_or_takes_none() -> None:
    assert vocabulary_of(FakeOpenAI(tokenizes=None)) == ()
    assert vocabulary_of(FakeOpenAI(takes_token_ids=False)) == ()
    assert vocabulary_of(FakeOpenAI(), endpoint="chat") == ()
