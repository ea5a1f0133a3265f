"""One streamed answer and its timing."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuserve import LLM, SamplingParams


@dataclass(slots=True)
class Answer:
    """What has arrived of an answer."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0

    def tokens_per_s(self) -> float:
        """Tokens after the first one, over the time since it; 0 for a single token."""
        decoding_s = self.seconds - self.first_token_s
        return (self.output_tokens - 1) / decoding_s if self.output_tokens > 1 else 0.0

    def speed(self) -> str:
        """One line for people."""
        return (
            f"[{self.output_tokens} tokens, {self.tokens_per_s():.1f} tokens/s, first after "
            f"{self.first_token_s * 1e3:.0f} ms, prompt of {self.prompt_tokens} tokens, "
            f"{self.finish_reason}]"
        )

    def report(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "first_token_s": self.first_token_s,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s(),
        }


def recommended_params(llm: LLM) -> SamplingParams:
    """What the model recommends; mild sampling where it recommends nothing.

    GGUF files bring no recommendation, and a small model rambles at temperature 1.
    """
    from fuserve import SamplingParams

    recommended = llm.get_default_sampling_params()
    if recommended == SamplingParams():
        return SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05)
    return recommended


def stream_answer(
    llm: LLM,
    request: str | Sequence[Mapping[str, str]],
    params: SamplingParams,
    answer: Answer,
) -> Generator[str, None, None]:
    """Yield the answer's text as it comes, and keep ``answer`` up to date.

    Closing the iterator, or leaving it, ends the request.

    Args:
        llm: the model.
        request: a prompt, or the messages of a conversation.
        params: how to sample.
        answer: an empty one.

    Raises:
        InvalidRequestError, CapacityError: the request is refused.
        RequestFailedError: it failed while it ran.
    """
    started = time.perf_counter()
    stream = llm.stream(request, params)
    answer.prompt_tokens = stream.num_prompt_tokens
    with closing(stream):
        for piece in stream:
            answer.seconds = time.perf_counter() - started
            if answer.output_tokens == 0:
                answer.first_token_s = answer.seconds
            answer.output_tokens += len(piece.token_ids)
            answer.text += piece.text
            answer.finish_reason = piece.finish_reason
            yield piece.text
