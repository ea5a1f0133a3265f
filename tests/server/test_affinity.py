"""Requests go where the beginning of their prompt is cached, unless that replica is busy."""

from __future__ import annotations

import json
from typing import Any

from fuserve.server.replicas.affinity import BLOCK_CHARS, PrefixAffinity, prefix_blocks

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 30}


def blocks_of(**request: Any) -> list[int]:
    return prefix_blocks(json.dumps(request).encode())


def common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_a_conversation_that_goes_on_begins_like_it_did() -> None:
    question = {"role": "user", "content": "Why is the sky blue? " * 10}
    answer = {"role": "assistant", "content": "Rayleigh."}
    short = blocks_of(messages=[SYSTEM, question], temperature=0.3)
    long = blocks_of(messages=[SYSTEM, question, answer, question], stream=True)
    assert len(short) > 5
    assert common(short, long) == len(short)


def test_other_system_prompts_tools_and_texts_begin_otherwise() -> None:
    messages = [SYSTEM, {"role": "user", "content": "Hi"}]
    with_tools = blocks_of(messages=messages, tools=[{"type": "function"}])
    assert common(blocks_of(messages=messages), with_tools) == 0
    text = "x" * (3 * BLOCK_CHARS)
    assert common(blocks_of(prompt=text), blocks_of(prompt=text[:-1] + "y")) == 2
    assert len(blocks_of(prompt=list(range(1000)))) > 5


def test_what_is_no_prompt_has_no_prefix() -> None:
    for body in (b"", b"{", b"[1]", b'{"prompt": 3}', b'{"input": "text"}', b"\xff"):
        assert prefix_blocks(body) == []


def test_a_known_beginning_goes_where_it_is_and_others_to_the_least_loaded() -> None:
    affinity: PrefixAffinity[str] = PrefixAffinity(slack=4)
    known = blocks_of(prompt="a" * 1000)
    affinity.remember(known, "b")
    assert affinity.choose(known, {"a": 0, "b": 4}) == "b"
    longer = blocks_of(prompt="a" * 1000 + "c" * 1000)
    assert affinity.choose(longer, {"a": 0, "b": 4}) == "b"
    assert affinity.choose(known, {"a": 0, "b": 5}) == "a"  # overloaded
    assert affinity.choose(blocks_of(prompt="z" * 1000), {"a": 1, "b": 0}) == "b"
    assert affinity.choose([], {"a": 0, "b": 1}) == "a"


def test_the_longest_beginning_decides() -> None:
    affinity: PrefixAffinity[str] = PrefixAffinity()
    affinity.remember(blocks_of(prompt="a" * 500), "a")
    affinity.remember(blocks_of(prompt="a" * 500 + "b" * 500), "b")
    prompt = blocks_of(prompt="a" * 500 + "b" * 600)
    assert affinity.choose(prompt, {"a": 0, "b": 0}) == "b"


def test_dead_replicas_and_old_prompts_are_forgotten() -> None:
    affinity: PrefixAffinity[str] = PrefixAffinity(most_blocks=10)
    known = blocks_of(prompt="a" * 1000)
    affinity.remember(known, "b")
    assert affinity.choose(known, {"a": 0}) == "a"  # b does not run
    affinity.forget("b")
    assert affinity.choose(known, {"a": 0, "b": 0}) == "a"
    affinity.remember(known, "b")
    affinity.remember(blocks_of(prompt="c" * 2000), "a")
    assert affinity.choose(known, {"a": 0, "b": 0}) == "a"
