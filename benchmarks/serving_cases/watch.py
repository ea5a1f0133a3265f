"""What a process holds while it runs, and whether it holds ever more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

MIB = 1 << 20
MAX_MIB_PER_HOUR = 1.0
# In a shorter run a few pages are a slope of their own; there the growth counts.
RESOLVED_S = 300.0
MAX_GROWTH_MIB = 4.0
WINDOW_S = 10.0


@dataclass(frozen=True)
class Sample:
    """A process at a moment."""

    at_s: float
    rss_bytes: int
    num_threads: int
    num_fds: int


@dataclass(frozen=True)
class Verdict:
    """Whether one figure stayed as it should."""

    what: str
    kept: bool
    figure: str

    def __str__(self) -> str:
        return f"{'kept  ' if self.kept else 'MISSED'}  {self.what}: {self.figure}"


def take_sample(process: psutil.Process, at_s: float) -> Sample:
    """The process now."""
    with process.oneshot():
        return Sample(at_s, process.memory_info().rss, process.num_threads(), process.num_fds())


async def watch(process: psutil.Process, samples: list[Sample], every_s: float) -> None:
    """Add a sample now and then, until this task is cancelled."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while True:
        samples.append(take_sample(process, loop.time() - started_s))
        await asyncio.sleep(every_s)


def judge(samples: Sequence[Sample], warm_up_s: float, idle: Sample) -> list[Verdict]:
    """What the samples after the warm-up say.

    Args:
        samples: taken under load.
        warm_up_s: how many seconds are left out.
        idle: taken after all requests had ended.
    """
    steady = [sample for sample in samples if sample.at_s >= warm_up_s]
    threads = [sample.num_threads for sample in steady]
    return [
        _judge_memory(steady),
        Verdict(
            "threads are constant",
            min(threads) == max(threads),
            f"{min(threads)} to {max(threads)}",
        ),
        _judge_descriptors(samples[0], steady, idle),
    ]


def _judge_memory(steady: Sequence[Sample]) -> Verdict:
    length_s = steady[-1].at_s - steady[0].at_s
    slope = slope_mib_per_hour(steady)
    growth_mib = slope * length_s / 3600
    resident = f"of {steady[-1].rss_bytes / MIB:.0f} MiB over {length_s:.0f} s"
    if length_s >= RESOLVED_S:
        kept = slope < MAX_MIB_PER_HOUR
        return Verdict("memory is flat", kept, f"{slope:+.2f} MiB/h {resident}")
    kept = growth_mib < MAX_GROWTH_MIB
    return Verdict("memory is flat", kept, f"{growth_mib:+.2f} MiB {resident}")


def _judge_descriptors(first: Sample, steady: Sequence[Sample], idle: Sample) -> Verdict:
    """Connections come and go; what is left when they have gone must be what was there before."""
    most = max(sample.num_fds for sample in steady)
    figure = f"{first.num_fds} before, at most {most} under load, {idle.num_fds} after"
    return Verdict("descriptors come back", idle.num_fds <= first.num_fds, figure)


def slope_mib_per_hour(samples: Sequence[Sample]) -> float:
    """Theil-Sen: the median slope between any two windows' medians; a single spike moves nothing.

    Source: P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, 1968.
    """
    times_s = np.array([sample.at_s for sample in samples])
    resident = np.array([sample.rss_bytes for sample in samples]) / MIB
    window_s = min(WINDOW_S, max((times_s[-1] - times_s[0]) / 8, 1e-9))
    windows = ((times_s - times_s[0]) // window_s).astype(int)
    kept = np.unique(windows)
    at_s = np.array([np.median(times_s[windows == window]) for window in kept])
    mib = np.array([np.median(resident[windows == window]) for window in kept])
    first, second = np.triu_indices(len(kept), k=1)
    if len(first) == 0:
        return 0.0
    slopes = (mib[second] - mib[first]) / (at_s[second] - at_s[first])
    return float(np.median(slopes)) * 3600
