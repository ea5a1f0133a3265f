"""The native sampler: one row of logits in, one token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from fuserve import _native

_NO_IDS: Final = np.zeros(0, dtype=np.int32)
_NO_VALUES: Final = np.zeros(0, dtype=np.float32)


class SampleStatus(IntEnum):
    """Whether a row of logits could be sampled."""

    OK = 0
    NAN = 1
    INFINITE = 2
    EMPTY = 3

    @property
    def description(self) -> str:
        """What is wrong with the row, for an error message."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS: Final = {
    SampleStatus.OK: "the logits are fine",
    SampleStatus.NAN: "the logits contain NaN",
    SampleStatus.INFINITE: "the logits contain +inf",
    SampleStatus.EMPTY: "every logit is -inf or excluded, no token is possible",
}


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The outcome for one row.

    Attributes:
        status: OK, or why there is no token.
        token: the chosen token id, -1 if there is none.
        logprob: of the token in the raw distribution, before bias, penalties and temperature;
            0.0 unless logprobs were asked for.
        rank: 1 for the raw distribution's most likely token; 0 unless logprobs were asked for.
        top_ids: the most likely tokens of the raw distribution, as many as were asked for.
        top_logprobs: their log probabilities.
    """

    status: SampleStatus
    token: int
    logprob: float = 0.0
    rank: int = 0
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def greedy_token(logits: npt.NDArray[np.float32]) -> SampledToken:
    """The most likely token, the lowest id among equals; ``logits``  # [vocab]."""
    status, token = _native.greedy_token(logits)
    return SampledToken(SampleStatus(status), token)


def score_token(logits: npt.NDArray[np.float32], token: int, num_logprobs: int) -> SampledToken:
    """Log probability and rank of a given token, and the most likely ones; ``logits``  # [vocab].

    Raises:
        ValueError: the token is outside the vocabulary.
    """
    return _sampled(_native.score_token(logits, token, num_logprobs))


def sample_token(
    logits: npt.NDArray[np.float32],
    u: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seen_ids: npt.NDArray[np.int32] = _NO_IDS,
    seen_counts: npt.NDArray[np.int32] = _NO_IDS,
    bias_ids: npt.NDArray[np.int32] = _NO_IDS,
    bias_values: npt.NDArray[np.float32] = _NO_VALUES,
    allowed: npt.NDArray[np.int32] = _NO_IDS,
    num_logprobs: int | None = None,
) -> SampledToken:
    """Sample one token; the steps and their order are vLLM's.

    Logit bias, penalties, tokens that are not allowed excluded, temperature, min-p, top-k, top-p;
    then the token at which the cumulative distribution passes ``u``. Equal logits are ranked by
    token id, lowest first.

    Args:
        logits: raw logits  # [vocab]
        u: a uniform draw in [0, 1).
        temperature: 0 takes the most likely token.
        top_k: 0 is off.
        seen_ids: the distinct tokens of prompt and output  # [seen]
        seen_counts: how often each was put out; 0 for those of the prompt alone  # [seen]
        bias_ids: tokens whose logit is shifted  # [biased]
        bias_values: by how much; -inf excludes the token  # [biased]
        allowed: a bit for each token, lowest first; others are never chosen. Empty allows all.
            # [ceil(vocab / 32)]
        num_logprobs: alternatives to report beside the token's own; None reports neither.

    Raises:
        ValueError: an argument is out of range, or an id outside the vocabulary.
        TypeError: an array has the wrong dtype or is not contiguous.
    """
    chosen = _native.sample_token(
        logits,
        u,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seen_ids,
        seen_counts,
        bias_ids,
        bias_values,
        allowed,
        -1 if num_logprobs is None else num_logprobs,
    )
    return _sampled(chosen)


def _sampled(
    choice: tuple[int, int, float, int, Sequence[int], Sequence[float]],
) -> SampledToken:
    status, token, logprob, rank, top_ids, top_logprobs = choice
    return SampledToken(
        SampleStatus(status), token, logprob, rank, tuple(top_ids), tuple(top_logprobs)
    )
