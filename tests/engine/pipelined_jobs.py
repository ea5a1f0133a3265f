"""Requests of all kinds that run together: long and short, branching, scored, alike."""

from __future__ import annotations

from fuserve.engine.sampling_params import SamplingParams
from tests.engine.async_driving import prompt
from tests.engine.driving import Job

JOBS: list[Job] = [
    (prompt(1, 200), SamplingParams(seed=1, max_tokens=40)),
    (prompt(2, 3), SamplingParams(seed=2, max_tokens=90, n=3)),
    (prompt(1, 200), SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=2)),
    *((prompt(3 + i, 20 + 7 * i), SamplingParams(seed=i, max_tokens=90)) for i in range(6)),
]
