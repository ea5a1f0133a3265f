"""Pace: how much of a step prompts may take, so that running streams keep flowing."""

from __future__ import annotations

from fuserve.engine.step_cost import StepCost, StepLoad

MIXED_STEP_RATIO = 2.0
"""A step with prompts may take this many times one without, unless a limit in ms is given.

Streams then see no gap of three times their usual one: half of it is left to what the model of a
step's cost does not know, such as memory that the system commits on the way.
"""

UNFELT_S = 0.02
"""A step may take this long in any case, unless a limit in ms is given: 50 tokens a second are more
than anyone reads. Few streams of a small model would else hold prompts to a few tokens a step, and
so remain few."""

_MIN_PREFILL_SHARE = 0.1  # of the decoding time: an impossible limit must not stop prompts
_UNMEASURED_TOKENS = 32  # of prompts beside running streams, before the machine's speed is known


class Pace:
    """Limits the prompts' part of each step.

    Args:
        cost: what steps take on this machine; observed by whoever runs them.
        max_itl_s: the longest step while streams run; None is ``MIXED_STEP_RATIO``, or ``UNFELT_S``
            where that is more.
    """

    def __init__(self, cost: StepCost, max_itl_s: float | None = None) -> None:
        self._cost = cost
        self._max_itl_s = max_itl_s

    def room(self, decoding: StepLoad) -> PrefillRoom:
        """The room for prompts in a step that decodes this."""
        if decoding.num_decode_tokens == 0:
            return PrefillRoom(self._cost)
        if self._cost.wants_decode:
            return PrefillRoom(self._cost, tokens=0, at_least=0)
        if not self._cost.knows_mixed_steps:
            return PrefillRoom(self._cost, tokens=_UNMEASURED_TOKENS)
        decode_s = self._cost.decode_seconds(decoding)
        limit_s = self._max_itl_s
        if limit_s is None:
            limit_s = max(MIXED_STEP_RATIO * decode_s, UNFELT_S)
        return PrefillRoom(
            self._cost, seconds=max(limit_s - decode_s, _MIN_PREFILL_SHARE * decode_s)
        )


class PrefillRoom:
    """What is left for prompts in one step: tokens, seconds, or neither limit.

    Args:
        cost: tells what chunks take.
        seconds: that all chunks together may take.
        tokens: that they may have.
        at_least: tokens that the first chunk gets in any case, so that prompts always advance.
    """

    def __init__(
        self,
        cost: StepCost,
        *,
        seconds: float | None = None,
        tokens: int | None = None,
        at_least: int = 1,
    ) -> None:
        self._cost = cost
        self._seconds = seconds
        self._tokens = tokens
        self._at_least = at_least

    def fits(self, start: int, num_tokens: int) -> int:
        """How many of a prompt's next tokens, from position ``start`` on, there is room for."""
        if self._seconds is not None:
            num_tokens = min(num_tokens, self._cost.chunk_tokens(self._seconds, start))
        if self._tokens is not None:
            num_tokens = min(num_tokens, self._tokens)
        return max(num_tokens, self._at_least)

    def take(self, start: int, num_tokens: int) -> None:
        """Use room for a chunk."""
        self._at_least = 0
        if self._seconds is not None:
            self._seconds -= self._cost.chunk_seconds(start, num_tokens)
        if self._tokens is not None:
            self._tokens -= num_tokens
