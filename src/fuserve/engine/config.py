"""EngineConfig: the limits of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fuserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_model_len: tokens of the longest sequence.
        max_num_seqs: completions computed together.
        max_num_batched_tokens: token budget of a step.
        max_itl_ms: the longest a step with prompts may take while streams run; None keeps it near
            the time of a step without.
        enable_prefix_caching: let requests use what earlier ones left in the KV cache.
        num_speculative_tokens: the most tokens guessed ahead in a step; 0 guesses none.
    """

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_itl_ms: float | None = None
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_itl_ms is not None and not 0 < self.max_itl_ms < math.inf:
            raise InvalidRequestError(f"max_itl_ms must be above 0, got {self.max_itl_ms}.")
        if self.num_speculative_tokens < 0:
            raise InvalidRequestError(
                f"num_speculative_tokens must be at least 0, got {self.num_speculative_tokens}."
            )
