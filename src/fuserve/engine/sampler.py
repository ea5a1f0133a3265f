"""One completion's sampling state: its random numbers, penalties and options."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.token_counts import TokenCounts
from fuserve.kernels.sampling import SampledToken, greedy_token, sample_token

_UINT64 = 2**64 - 1


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
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], *, seed: int, branch: int
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
            params.greedy and not penalized and not bias and params.logprobs is None
        )

    def sample(self, logits: npt.NDArray[np.float32]) -> SampledToken:
        """Choose the next token from its logits  # [vocab]

        The result's status tells whether the logits could be used.
        """
        if self._plain_greedy:
            return greedy_token(logits)
        params = self._params
        counts = {}
        if self._counts is not None:
            counts = {"seen_ids": self._counts.ids, "seen_counts": self._counts.counts}
        chosen = sample_token(
            logits,
            0.0 if params.greedy else self._random.random(),
            temperature=0.0 if params.greedy else params.temperature,
            top_k=min(max(params.top_k, 0), len(logits)),
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias_ids=self._bias_ids,
            bias_values=self._bias_values,
            num_logprobs=params.logprobs,
            **counts,
        )
        if self._counts is not None and chosen.token >= 0:
            self._counts.add(chosen.token)
        return chosen
