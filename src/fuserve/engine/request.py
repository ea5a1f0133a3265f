"""Request: a prompt, its parameters, and the completions in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuserve.engine.generation import Generation
from fuserve.engine.outputs import RequestOutput, RequestTimings
from fuserve.engine.sampling_params import SamplingParams
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
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether any of its tokens has been in a step."""
        return self.scheduled_s is not None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(generation.finish_reason is not None for generation in self.generations)

    def output(self, now_s: float, error: FuserveError | None = None) -> RequestOutput:
        """The request as it ends now."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(generation.completion() for generation in self.generations),
            timings=RequestTimings(self.arrival_s, self.scheduled_s, self.first_token_s, now_s),
            num_preemptions=sum(g.sequence.num_preemptions for g in self.generations),
            num_cached_tokens=self._num_cached_tokens,
            error=error,
        )

    @property
    def _num_cached_tokens(self) -> int:
        if not self.generations:
            return 0
        return self.generations[0].sequence.num_cached_tokens or 0
