"""Numbers of tokens, as responses tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuserve.engine.outputs import RequestOutput


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's ``usage`` of the prompts of one request."""
    prompt_tokens = sum(output.num_prompt_tokens for output in outputs)
    completion_tokens = sum(output.num_generated_tokens for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
    }
