"""Schedule: what the scheduler decided for one step. Data only."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from fuserve.engine.sequence import Chunk
from fuserve.engine.step_cost import StepLoad


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the next step does.

    Attributes:
        chunks: those of generating sequences first.
        copies: (from, to): blocks whose contents are copied before the step.
        load: what it amounts to.
    """

    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    load: StepLoad


def decode_load(chunks: Items[Chunk]) -> StepLoad:
    """The load of generating sequences."""
    return StepLoad(
        num_decode_tokens=sum(chunk.num_step_tokens for chunk in chunks),
        num_context_tokens=sum(chunk.num_step_tokens * (chunk.start + 1) for chunk in chunks),
    )


def with_prefill(decoding: StepLoad, chunks: Items[Chunk]) -> StepLoad:
    """The load with the chunks of prompts added."""
    lone = [chunk for chunk in chunks if chunk.num_tokens == 1]
    longer = [chunk for chunk in chunks if chunk.num_tokens > 1]
    return StepLoad(
        decoding.num_decode_tokens,
        decoding.num_context_tokens,
        num_prefill_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_prefill_pairs=sum(
            chunk.num_tokens * (2 * chunk.start + chunk.num_tokens) // 2 for chunk in longer
        ),
        num_prefill_reads=sum(chunk.start for chunk in longer),
        num_lone_tokens=len(lone),
        num_lone_context=sum(chunk.start for chunk in lone),
    )
