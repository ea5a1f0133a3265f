"""What is asked of a server: lengths, prompts and arrivals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fuserve.errors import InvalidRequestError
from fuserve.loadgen import PlannedRequest, TokenRange, Vocabulary, Workload, plan

IDS = Vocabulary(tuple(range(1000, 1400)))


def workload(**changes: object) -> Workload:
    fields: dict[str, object] = {
        "num_prompts": 200,
        "prompt_tokens": TokenRange(16, 512),
        "output_tokens": TokenRange(16, 256),
    }
    return Workload(**(fields | changes))  # type: ignore[arg-type]


def test_a_seed_repeats_a_load_exactly_and_another_seed_does_not() -> None:
    first, again = plan(workload(request_rate=3.0), IDS), plan(workload(request_rate=3.0), IDS)
    assert first == again
    assert first != plan(workload(request_rate=3.0, seed=1), IDS)


def test_lengths_lie_in_their_ranges_and_reach_both_ends() -> None:
    requests = plan(workload(prompt_tokens=TokenRange(2, 5), output_tokens=TokenRange(7, 8)), IDS)
    assert {len(request.prompt) for request in requests} == {2, 3, 4, 5}
    assert {request.output_tokens for request in requests} == {7, 8}


def test_servers_with_different_tokenizers_get_the_same_lengths_and_arrivals() -> None:
    def shape(request: PlannedRequest) -> tuple[float, int, int]:
        prompt = request.prompt
        length = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        return request.arrival_s, length, request.output_tokens

    load = workload(request_rate=5.0, shared_prefix_tokens=30)
    texts, ids = plan(load, Vocabulary()), plan(load, IDS)
    assert [shape(request) for request in texts] == [shape(request) for request in ids]


def test_every_prompt_begins_with_the_shared_prefix_and_goes_its_own_way() -> None:
    prompts = [r.prompt for r in plan(workload(num_prompts=8, shared_prefix_tokens=64), IDS)]
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 1
    assert len({tuple(prompt[64:80]) for prompt in prompts}) == 8


def test_poisson_arrivals_keep_their_rate_and_are_irregular() -> None:
    arrivals = [r.arrival_s for r in plan(workload(num_prompts=4000, request_rate=20.0), IDS)]
    gaps = np.array([later - earlier for earlier, later in pairwise(arrivals)])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)  # exponential: the mean again


def test_without_a_rate_everything_arrives_at_once() -> None:
    assert {request.arrival_s for request in plan(workload(), IDS)} == {0.0}


@pytest.mark.parametrize(("text", "low", "high"), [("128", 128, 128), ("16-512", 16, 512)])
def test_ranges_are_read_as_they_are_written(text: str, low: int, high: int) -> None:
    assert TokenRange.parse(text) == TokenRange(low, high)
    assert str(TokenRange(low, high)) == text


@pytest.mark.parametrize("text", ["", "a", "0", "5-2", "-3", "1-2-3"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="16-512"):
        TokenRange.parse(text)
