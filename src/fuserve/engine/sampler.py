"""One completion's sampling state: its random numbers, penalties and options."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from fuserve.engine.guided import Constraint
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.token_counts import TokenCounts
from fuserve.kernels.sampling import SampledToken, SampleStatus, greedy_token, sample_token

_MINUS_INFINITY = np.float32(-np.inf)
_UINT64 = 2**64 - 1
_NO_IDS = np.zeros(0, dtype=np.int32)
_ALL = np.zeros(0, dtype=np.int32)

Mask = npt.NDArray[np.int32]
"""A bit a token, the lowest first; no words at all allow every token."""


def draw_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(64)


class TokenSampler:
    """Chooses the tokens of one completion, one row of logits each.

    The draws come from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed and
    branch; the i-th token uses the i-th draw. So a seeded completion is the same whatever runs
    beside it, and recomputing its cache after a preemption changes nothing.

    Args:
        params: of the request.
        prompt_ids: penalties count them as seen.
        seed: of the request, given or drawn.
        branch: the completion's index among the ``n`` of its prompt.
        end_ids: tokens that end the completion.
        constraint: which tokens its grammar allows; advanced with every token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        branch: int,
        end_ids: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.Philox(key=[seed & _UINT64, branch]))
        bias = params.logit_bias or {}
        self._bias_ids = np.array(list(bias), dtype=np.int32)
        self._bias_values = np.array(list(bias.values()), dtype=np.float32)
        penalized = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._counts = TokenCounts(prompt_ids) if penalized else None
        self._plain_greedy = (
            params.greedy
            and not penalized
            and not bias
            and params.logprobs is None
            and constraint is None
        )
        self._end_ids = np.array(sorted(end_ids), dtype=np.int32)
        self._constraint = constraint
        self._num_to_go_on = params.min_tokens

    def sample(self, logits: npt.NDArray[np.float32]) -> SampledToken:
        """Choose the next token from its logits  # [vocab]

        The result's status tells whether the logits could be used.

        Raises:
            RequestFailedError: the constraint cannot be kept up.
        """
        allowed = _ALL if self._constraint is None else self._constraint.allowed()
        banned = self._banned(allowed)
        self._num_to_go_on -= 1
        if self._plain_greedy and not banned.size:
            return greedy_token(logits)
        chosen = self._draw(logits, allowed, banned)
        if chosen.status is not SampleStatus.OK:
            return chosen
        if self._counts is not None:
            self._counts.add(chosen.token)
        if self._constraint is not None:
            self._constraint.advance(chosen.token)
        return chosen

    def _banned(self, allowed: Mask) -> npt.NDArray[np.int32]:
        """Tokens that would end the completion too early, unless nothing else is allowed."""
        if self._num_to_go_on <= 0 or (allowed.size and not _holds_others(allowed, self._end_ids)):
            return _NO_IDS
        return self._end_ids

    def _draw(
        self, logits: npt.NDArray[np.float32], allowed: Mask, banned: npt.NDArray[np.int32]
    ) -> SampledToken:
        params = self._params
        counts = {}
        if self._counts is not None:
            counts = {"seen_ids": self._counts.ids, "seen_counts": self._counts.counts}
        bias_ids, bias_values = self._bias_ids, self._bias_values
        if banned.size:
            bias_ids = np.concatenate((bias_ids, banned))
            bias_values = np.concatenate((bias_values, np.full(len(banned), _MINUS_INFINITY)))
        return sample_token(
            logits,
            0.0 if params.greedy else self._random.random(),
            temperature=0.0 if params.greedy else params.temperature,
            top_k=min(max(params.top_k, 0), len(logits)),
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias_ids=bias_ids,
            bias_values=bias_values,
            num_logprobs=params.logprobs,
            allowed=allowed,
            **counts,
        )


def _holds_others(allowed: Mask, ids: npt.NDArray[np.int32]) -> bool:
    """Whether a mask has any token beside those of ``ids``."""
    others = allowed.view(np.uint32).copy()
    np.bitwise_and.at(others, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    return bool(others.any())
