"""What is asked of a server and when: a plan that a seed repeats exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fuserve.errors import InvalidRequestError
from fuserve.loadgen.vocabulary import Prompt, Vocabulary


@dataclass(frozen=True, slots=True)
class TokenRange:
    """A number of tokens, drawn uniformly; both ends are included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise InvalidRequestError(
                f"A range of tokens is {self}; it must be such as 128 or 16-512."
            )

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """``"16-512"`` or ``"128"``.

        Raises:
            InvalidRequestError: it is neither.
        """
        low, _, high = text.partition("-")
        try:
            return cls(int(low), int(high or low))
        except ValueError:
            raise InvalidRequestError(
                f"{text!r} is no range of tokens; give one such as 128 or 16-512."
            ) from None


@dataclass(frozen=True, slots=True)
class Workload:
    """A mix of requests.

    Args:
        num_prompts: requests in all.
        prompt_tokens: of each prompt, what is shared not counted.
        output_tokens: asked of each request.
        shared_prefix_tokens: with which every prompt begins.
        request_rate: arrivals per second of a Poisson process; infinity sends all at once.
        seed: of lengths, prompts and arrivals.
    """

    num_prompts: int
    prompt_tokens: TokenRange
    output_tokens: TokenRange
    shared_prefix_tokens: int = 0
    request_rate: float = math.inf
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: it arrives ``arrival_s`` after the start."""

    arrival_s: float
    prompt: Prompt
    output_tokens: int


def plan(workload: Workload, vocabulary: Vocabulary) -> list[PlannedRequest]:
    """Draw a workload's requests, by arrival.

    Lengths and arrivals depend on the seed alone, so that servers with different tokenizers get
    the same load.
    """
    count = workload.num_prompts
    lengths = np.random.default_rng([workload.seed, 0])
    words = np.random.default_rng([workload.seed, 1])
    arrivals = np.random.default_rng([workload.seed, 2])
    prompt_lengths = _draw(lengths, workload.prompt_tokens, count)
    output_lengths = _draw(lengths, workload.output_tokens, count)
    if math.isinf(workload.request_rate):
        arrival_s = np.zeros(count)
    else:
        arrival_s = np.cumsum(arrivals.exponential(1 / workload.request_rate, size=count))
    prefix = vocabulary.draw(words, workload.shared_prefix_tokens)
    return [
        PlannedRequest(
            float(arrival_s[i]),
            vocabulary.prompt([*prefix, *vocabulary.draw(words, int(prompt_lengths[i]))]),
            int(output_lengths[i]),
        )
        for i in range(count)
    ]


def _draw(rng: np.random.Generator, tokens: TokenRange, count: int) -> list[int]:
    return [int(length) for length in rng.integers(tokens.low, tokens.high, count, endpoint=True)]
