"""What is to be served: how long sequences are, and how many run together. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """What memory is kept for, and what speeds are of.

    Attributes:
        max_model_len: tokens of the longest sequence; the KV cache holds as many of each.
        max_num_seqs: sequences that run together.
        max_num_batched_tokens: token budget of a step.
        prompt_tokens: of the prompt whose prefill is timed.
        output_tokens: decoded after it; decoding is timed at their middle.
    """

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    prompt_tokens: int = 512
    output_tokens: int = 64

    @property
    def decode_context(self) -> int:
        """The context at which decoding is timed."""
        return self.prompt_tokens + self.output_tokens // 2
