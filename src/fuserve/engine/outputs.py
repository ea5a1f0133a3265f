"""What a request gives back: pieces while it runs, one RequestOutput at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fuserve.errors import FuserveError
from fuserve.kernels.sampling import SampledToken

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of a token in the model's own distribution; rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""The chosen token first, then the alternatives, most likely first; keyed by token id."""


def token_logprobs(scored: SampledToken, display: Callable[[int], str]) -> TokenLogprobs:
    """What the sampler reports of a token and its alternatives; ``display`` shows a token."""
    entry = {scored.token: Logprob(scored.logprob, scored.rank, display(scored.token))}
    alternatives = zip(scored.top_ids, scored.top_logprobs, strict=True)
    for rank, (token, logprob) in enumerate(alternatives, start=1):
        if token != scored.token:
            entry[token] = Logprob(logprob, rank, display(token))
    return entry


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one completion.

    ``text`` may be empty while a character is incomplete or a stop string may be beginning; the
    texts of all pieces joined are the completion's text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: 0 to ``n - 1``.
        text: without the stop string or stop token, unless asked for.
        token_ids: all generated tokens, those that ended the completion included.
        logprobs: one entry a token, None unless asked for.
        cumulative_logprob: sum of the tokens' log probabilities, None unless asked for.
        finish_reason: "stop" (end of sequence, stop string or token), "length", "abort", "error".
        stop_reason: the stop string or stop token id that was met, None for end of sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    cumulative_logprob: float | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Instants of one monotonic clock, in seconds; None for what has not happened."""

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival to the first token, waiting included."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last."""
        if self.first_token_s is None or self.finished_s is None:
            return None
        return self.finished_s - self.first_token_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request that has ended.

    Attributes:
        request_id: as given or drawn when it was added.
        prompt: the prompt's text, None if it came as token ids.
        prompt_token_ids: what the model read.
        outputs: ``n`` completions, by index.
        timings: when it arrived, began and ended.
        num_preemptions: how often a completion was set back for want of cache and recomputed.
        prompt_logprobs: one entry a prompt token, None for the first; None unless asked for.
        num_draft_tokens: tokens that were guessed ahead.
        num_accepted_tokens: how many of them were right.
        embedding: of a request for one; it has no ``outputs``  # float32 [hidden]
        num_cached_tokens: tokens of the prompt that were taken from the prefix cache.
        error: why the request failed, None if it did not; the completions then have the finish
            reason "error" and hold what was generated before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    timings: RequestTimings
    num_preemptions: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    embedding: npt.NDArray[np.float32] | None = None
    num_cached_tokens: int = 0
    error: FuserveError | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(output.token_ids) for output in self.outputs)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The pooled hidden states of a prompt  # embedding: float32 [hidden]"""

    embedding: npt.NDArray[np.float32]
    num_prompt_tokens: int


@dataclass(slots=True)
class RequestUpdate:
    """What one engine step did to one request; ``output`` is set by its last update.

    ``prompt_logprobs``, where they were asked for, come with the first token.
    """

    request_id: str
    pieces: list[Piece]
    output: RequestOutput | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
