"""What threads cost that only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from fuserve._native import ThreadPool

from .measure import Claim, Effort, Row

BARRIERS = 20_000
BARRIER_LIMIT_S = 1e-6


def measure_overheads(effort: Effort, quick: bool) -> Iterator[Row | Claim]:
    """A barrier while all threads spin; a decode step has about seven in each layer."""
    pool = ThreadPool(effort.threads)
    count = BARRIERS // 10 if quick else BARRIERS
    seconds = median(pool.barrier_seconds(count) for _ in range(effort.rounds))
    yield Claim(
        f"barrier of {effort.threads} spinning threads: 1 us in its time",
        BARRIER_LIMIT_S / seconds,
        1.0,
        f"{seconds * 1e6:.2f} us",
    )
