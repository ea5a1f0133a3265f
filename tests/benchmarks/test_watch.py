"""What the soak concludes from its samples."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving_cases.watch import MIB, Sample, judge, slope_mib_per_hour

BASE_BYTES = 300 * MIB
IDLE = Sample(0.0, BASE_BYTES, 8, 20)


def samples(
    minutes: float, *, mib_per_hour: float = 0.0, noise_mib: float = 0.0, warm_up_mib: float = 0.0
) -> list[Sample]:
    """One a second; memory rises in the first third, then as told."""
    noise = random.Random(0)
    count = round(minutes * 60)
    return [
        Sample(
            float(second),
            BASE_BYTES
            + round(MIB * mib_per_hour * second / 3600)
            + round(MIB * warm_up_mib * min(second / (count / 3), 1.0))
            + round(MIB * noise.uniform(-noise_mib, noise_mib)),
            num_threads=8,
            num_fds=20 + second % 5,
        )
        for second in range(count)
    ]


def judged(taken: list[Sample], idle: Sample = IDLE) -> dict[str, bool]:
    return {v.what: v.kept for v in judge(taken, len(taken) / 3, idle)}


def test_a_leak_shows_through_noise_that_is_larger() -> None:
    leaking = samples(15, mib_per_hour=8.0, noise_mib=1.0)
    assert slope_mib_per_hour(leaking) == pytest.approx(8.0, abs=2.0)
    assert not judged(leaking)["memory is flat"]


def test_memory_that_grew_only_in_the_warm_up_is_flat() -> None:
    assert judged(samples(15, warm_up_mib=200.0))["memory is flat"]


def test_one_spike_is_no_slope() -> None:
    taken = samples(15)
    spike = taken[600]
    taken[600] = Sample(spike.at_s, spike.rss_bytes + 500 * MIB, 8, 20)
    assert slope_mib_per_hour(taken) == 0.0


def test_a_short_run_is_judged_by_what_it_grew() -> None:
    assert judged(samples(1, mib_per_hour=60.0))["memory is flat"]  # 0.7 MiB in 40 s
    assert not judged(samples(1, mib_per_hour=900.0))["memory is flat"]


def test_a_thread_more_is_a_thread_too_many() -> None:
    taken = samples(15)
    taken[-1] = Sample(taken[-1].at_s, BASE_BYTES, 9, 20)
    assert not judged(taken)["threads are constant"]
    assert judged(samples(15))["threads are constant"]


def test_descriptors_may_come_and_go_but_not_stay() -> None:
    assert judged(samples(15))["descriptors come back"]
    leaked = Sample(0.0, BASE_BYTES, 8, 21)
    assert not judged(samples(15), idle=leaked)["descriptors come back"]
