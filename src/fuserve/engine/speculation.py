"""Drafts without a draft model: what followed the last time the same tokens stood there.

Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with reference"). A draft is a guess and
nothing more: the step computes logits behind each guessed token, the sampler chooses from them in
order as if there were no guesses, and a guess counts if it is what was chosen. So the tokens are
the same with drafts and without, greedy or sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fuserve.engine.guided import Constraint

TOKEN_COST: Final = 0.2
"""What one more token adds to a step, in steps of a single token; benchmarks/speculation.py."""

_GRAM_SIZES: Final = (4, 2)
_OBSERVATION_WEIGHT: Final = 0.15
_FIRST_ESTIMATE: Final = 0.6
_TOKENS_BETWEEN_PROBES: Final = 48
_PROBE_TOKENS: Final = 3


class Speculator:
    """Guesses what follows one completion, as far as guessing pays.

    Args:
        max_tokens: of a draft.
        constraint: of the completion; what its grammar forces needs no guessing, and what it does
            not allow is not tried.
    """

    def __init__(self, max_tokens: int, constraint: Constraint | None = None) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._max_tokens = max_tokens
        self._constraint = constraint
        self._grams = NgramIndex()
        self._guesses, self._forced = PayGate(), PayGate()
        self._source = self._guesses  # of the latest draft

    def propose(self, tokens: Sequence[int], num_decoding: int) -> list[int]:
        """A guess of what follows ``tokens``, which only ever grow; often empty.

        Args:
            tokens: prompt and output.
            num_decoding: sequences that will decode in the same step; the more there are, the
                less a further token comes for free.
        """
        cost = token_cost(num_decoding)
        if self._constraint is not None:
            forced = self._constraint.forced()
            if forced:
                self._source = self._forced
                return forced[: self._forced.length(cost, self._max_tokens)]
        self._source = self._guesses
        length = self._guesses.length(cost, self._max_tokens)
        drafts = self._grams.lookup(tokens, length) if length > 0 else []
        if drafts and self._constraint is not None:
            drafts = drafts[: self._constraint.num_valid(drafts)]
        return drafts

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from the latest draft: how many were tried, how many of the first were right."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self._source.observe(num_drafted, num_accepted)


class PayGate:
    """How long a draft should be, from how often the last ones were right."""

    def __init__(self) -> None:
        self.acceptance = _FIRST_ESTIMATE  # chance that a guess is right if those before it are
        self._tokens_to_probe = 0

    def length(self, cost: float, longest: int) -> int:
        """Tokens to guess now; mostly 0 while guessing does not pay, with a probe now and then."""
        length = draft_length(self.acceptance, cost, longest)
        if length > 0:
            return length
        self._tokens_to_probe -= 1
        return 0 if self._tokens_to_probe > 0 else min(_PROBE_TOKENS, longest)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Take the outcome of a draft into the estimate."""
        if num_drafted == 0:
            return
        for outcome in [1.0] * num_accepted + [0.0] * (num_accepted < num_drafted):
            self.acceptance += _OBSERVATION_WEIGHT * (outcome - self.acceptance)
        self._tokens_to_probe = _TOKENS_BETWEEN_PROBES


class NgramIndex:
    """Where short runs of a growing list of tokens stood last."""

    def __init__(self) -> None:
        self._followed_at: dict[tuple[int, ...], int] = {}
        self._num_indexed = 1

    def lookup(self, tokens: Sequence[int], length: int) -> list[int]:
        """``length`` tokens after the latest earlier place of the longest known ending."""
        self._extend(tokens)
        for size in _GRAM_SIZES:
            start = self._followed_at.get(tuple(tokens[-size:]))
            if start is not None:
                # A place that overlaps the end repeats itself: go round in it.
                period = len(tokens) - start
                return [tokens[start + offset % period] for offset in range(length)]
        return []

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index every place but the end itself, which nothing follows yet."""
        for end in range(self._num_indexed, len(tokens)):
            for size in _GRAM_SIZES:
                if end >= size:
                    self._followed_at[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens))


def token_cost(num_decoding: int) -> float:
    """What a further token of one sequence costs, relative to what it may gain.

    A step takes 1 + TOKEN_COST * (tokens - 1): weights are read once, whoever needs them. Among
    many sequences the step is longer and a token of one of them is a smaller part of its yield.
    """
    others = max(num_decoding, 1) - 1
    return TOKEN_COST * (1 + others) / (1.0 + TOKEN_COST * others)


def draft_length(acceptance: float, cost: float, longest: int) -> int:
    """How many tokens to guess, for the most tokens per time; 0 if guessing does not pay.

    With ``n`` guesses a step yields 1 + p + ... + p^n tokens in the time of 1 + n * cost steps.
    """
    best, best_rate = 0, 1.0
    tokens, chance = 1.0, 1.0
    for length in range(1, longest + 1):
        chance *= acceptance
        tokens += chance
        rate = tokens / (1.0 + length * cost)
        if rate > best_rate:
            best, best_rate = length, rate
    return best
