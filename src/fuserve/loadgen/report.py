"""What a run's users saw: throughput and the percentiles of their waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fuserve.loadgen.client import Answer
from fuserve.loadgen.drive import Run


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a latency, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None if nothing was measured."""
        if not seconds:
            return None
        ms = np.asarray(seconds) * 1e3
        p50, p90, p99 = (float(value) for value in np.percentile(ms, (50, 90, 99)))
        return cls(float(ms.mean()), p50, p90, p99, float(ms.max()))


@dataclass(frozen=True, slots=True)
class ServingReport:
    """A run in figures. Throughput and latencies are those of the requests that were completed.

    Args:
        errors: how often each happened, by status or kind.
        prompt_tokens: None if the server did not tell them.
        output_tokens_counted: "usage", as the server told; "chunks" where it did not.
        ttft_ms: from when a request was due to its first token.
        tpot_ms: time per token after a request's first.
        itl_ms: gaps between neighbouring chunks of a stream.
        e2e_ms: from when a request was due to its end.
    """

    num_requests: int
    num_completed: int
    errors: dict[str, int]
    duration_s: float
    peak_concurrency: int
    prompt_tokens: int | None
    output_tokens: int
    output_tokens_counted: str
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None


def summarize(run: Run) -> ServingReport:
    """Count and average a run."""
    done = [answer for answer in run.answers if not answer.error]
    streamed = [answer for answer in done if answer.chunk_s]
    output_tokens = sum(answer.output_tokens for answer in done)
    prompts = [a.prompt_tokens for a in done if a.prompt_tokens is not None]
    seconds = max(run.duration_s, 1e-9)
    return ServingReport(
        num_requests=len(run.answers),
        num_completed=len(done),
        errors=dict(
            Counter(a.error.partition(":")[0] for a in run.answers if a.error).most_common()
        ),
        duration_s=run.duration_s,
        peak_concurrency=_peak_concurrency(run.answers),
        prompt_tokens=sum(prompts) if len(prompts) == len(done) else None,
        output_tokens=output_tokens,
        output_tokens_counted="usage" if all(a.usage_reported for a in done) else "chunks",
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=output_tokens / seconds,
        ttft_ms=Percentiles.of([a.chunk_s[0] - a.due_s for a in streamed]),
        tpot_ms=Percentiles.of(
            [
                (a.chunk_s[-1] - a.chunk_s[0]) / (a.output_tokens - 1)
                for a in streamed
                if a.output_tokens > 1
            ]
        ),
        itl_ms=Percentiles.of([gap for a in streamed for gap in gaps_s(a)]),
        e2e_ms=Percentiles.of([a.end_s - a.due_s for a in done]),
    )


def gaps_s(answer: Answer) -> list[float]:
    """Seconds between neighbouring chunks."""
    return [later - earlier for earlier, later in pairwise(answer.chunk_s)]


def _peak_concurrency(answers: Sequence[Answer]) -> int:
    """The most requests that were due and not yet answered at one time."""
    events = sorted(
        [(answer.due_s, 1) for answer in answers] + [(answer.end_s, -1) for answer in answers]
    )
    peak = running = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak
