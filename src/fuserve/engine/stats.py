"""Figures of an engine at work, and who wants to hear of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fuserve.engine.outputs import RequestOutput
from fuserve.engine.step_cost import StepLoad

StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(slots=True)
class TokenTotals:
    """Tokens since the engine was made; the engine counts here."""

    prompt: int = 0
    generation: int = 0
    draft: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds now, and what it has done since it was made.

    Attributes:
        num_running: requests that have begun and not ended, preempted ones included.
        num_waiting: requests that have not begun.
        num_waiting_tokens: tokens of their prompts.
        num_preemptions_total: how often a completion was set back for want of blocks.
        num_blocks: blocks of the KV cache.
        num_free_blocks: blocks that no request holds, cached ones included.
        num_cached_blocks: free blocks whose contents may be used again.
        prefix_query_tokens_total: tokens of the completions that have begun.
        prefix_hit_tokens_total: how many of them were in the prefix cache.
        draft_tokens_total: tokens that were guessed and verified.
        accepted_tokens_total: how many of them were right.
        prompt_tokens_total: tokens of the prompts that have begun.
        generation_tokens_total: tokens generated.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_preemptions_total: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    prefix_query_tokens_total: int
    prefix_hit_tokens_total: int
    draft_tokens_total: int
    accepted_tokens_total: int
    prompt_tokens_total: int
    generation_tokens_total: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step that has run.

    Attributes:
        kind: prompts alone, generating sequences alone, or both.
        num_prefill_tokens: tokens of prompts.
        num_decode_tokens: tokens of generating sequences, drafts included.
        execute_s: seconds in the executor.
        overhead_s: seconds around it: choosing, sampling, detokenizing, delivering.
    """

    kind: StepKind
    num_prefill_tokens: int
    num_decode_tokens: int
    execute_s: float
    overhead_s: float

    @classmethod
    def of(cls, load: StepLoad, execute_s: float, overhead_s: float) -> StepStats:
        """The figures of a step with this load."""
        kind: StepKind = "mixed"
        if load.num_prefill_tokens == 0:
            kind = "decode"
        elif load.num_decode_tokens == 0:
            kind = "prefill"
        return cls(kind, load.num_prefill_tokens, load.num_decode_tokens, execute_s, overhead_s)


class EngineObserver(Protocol):
    """Hears what an engine does, on the engine's thread: it must be quick."""

    def on_step(self, step: StepStats, stats: EngineStats) -> None:
        """A step has run and its results are delivered."""

    def on_finished(self, output: RequestOutput) -> None:
        """A request has ended, in whatever way."""
