"""Request: a prompt, its parameters, and the completions in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuserve.engine.embedding import Embedding
from fuserve.engine.generation import Generation
from fuserve.engine.outputs import RequestOutput, RequestTimings
from fuserve.engine.prompt_scores import PromptScores
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.sequence import Sequence
from fuserve.errors import FuserveError


@dataclass(slots=True, eq=False)
class Request:
    """What the engine keeps of a request until all its completions have ended.

    Instants are of the engine's monotonic clock, in seconds; ``deadline_s`` is the one by which it
    must have ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_s: float
    deadline_s: float | None = None
    generations: list[Generation] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    embedding: Embedding | None = None
    reader: Sequence | None = None  # of the prompt, where it is only embedded
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether any of its tokens has been in a step."""
        return self.scheduled_s is not None

    @property
    def sequences(self) -> list[Sequence]:
        """Those of all completions, or the one whose prompt is embedded."""
        if self.reader is not None:
            return [self.reader]
        return [generation.sequence for generation in self.generations]

    @property
    def finished(self) -> bool:
        """Whether every completion has ended, or the embedding is made."""
        if self.embedding is not None:
            return self.embedding.vector is not None
        return all(generation.finish_reason is not None for generation in self.generations)

    def output(self, now_s: float, error: FuserveError | None = None) -> RequestOutput:
        """The request as it ends now."""
        speculators = [g.speculator for g in self.generations if g.speculator is not None]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(generation.completion() for generation in self.generations),
            timings=RequestTimings(self.arrival_s, self.scheduled_s, self.first_token_s, now_s),
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            num_cached_tokens=self.sequences[0].num_cached_tokens or 0,
            num_draft_tokens=sum(speculator.num_drafted for speculator in speculators),
            num_accepted_tokens=sum(speculator.num_accepted for speculator in speculators),
            prompt_logprobs=None if self.prompt_scores is None else self.prompt_scores.entries,
            embedding=None if self.embedding is None else self.embedding.vector,
            error=error,
        )
