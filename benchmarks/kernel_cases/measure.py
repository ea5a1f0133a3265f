"""Timing in turns, the machine's ceilings, and the rows of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import numpy as np
import numpy.typing as npt

from fuserve.kernels.machine import (
    measure_bandwidth,
    measure_byte_dot,
    measure_fp32,
    measure_row_dot,
)

COLD_BYTES = 256 << 20
"""Copies of one operand fill at least this much, far more than a last-level cache."""

Call = Callable[[int], object]
"""Runs a kernel once on the copy of its operands with this number."""


OnInput = Callable[[npt.NDArray[np.float32]], Call]
"""Binds a kernel to its input."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    threads: int
    rounds: int  # turns that every kernel of a comparison has
    turn_s: float  # seconds of a turn, of at least one call
    slow_s: float = 2.0  # a kernel whose call takes longer has one turn


@dataclass(frozen=True)
class Ceilings:
    """Rates of the machine that bound a kernel, measured with as many threads."""

    read_bytes_per_s: float
    fp32_op_per_s: float
    int8_dot_op_per_s: float
    int4_dot_op_per_s: float
    row_dot_op_per_s: float

    @classmethod
    def measure(cls, threads: int) -> Ceilings:
        """Measure them now."""
        return cls(
            measure_bandwidth(threads),
            measure_fp32(threads),
            measure_byte_dot(threads, int4=False),
            measure_byte_dot(threads, int4=True),
            measure_row_dot(threads),
        )


@dataclass(frozen=True)
class Row:
    """One kernel on one shape, beside its ceiling and its peer."""

    kernel: str
    shape: str
    case: str  # what else tells rows of a shape apart: M, or the context
    seconds: float
    rate: float
    unit: str  # of rate and ceiling: GOP/s or GB/s
    bound: str  # what the ceiling is; empty if none applies
    ceiling: float | None
    peer: str
    peer_seconds: float | None

    @property
    def fraction(self) -> float | None:
        """The rate over its ceiling."""
        return None if self.ceiling is None else self.rate / self.ceiling

    @property
    def peer_ratio(self) -> float | None:
        """How many times as fast as the peer."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds


@dataclass(frozen=True)
class Claim:
    """One line of the issue's table."""

    name: str
    fraction: float
    at_least: float
    detail: str

    def __str__(self) -> str:
        verdict = "met" if self.fraction >= self.at_least else "MISSED"
        return (
            f"CLAIM {self.name}: {self.fraction:.0%} (at least {self.at_least:.0%}: {verdict}); "
            f"{self.detail}"
        )


def roofline_row(
    kernel: str,
    shape: str,
    case: str,
    seconds: Mapping[str, float],
    *,
    operations: float,
    num_bytes: float,
    arithmetic: tuple[str, float],
    read_bytes_per_s: float,
    in_bytes: bool,
) -> Row:
    """A row whose ceiling is the slower of arithmetic and memory.

    Args:
        kernel: its name.
        shape: its shape.
        case: the rest of its name.
        seconds: of a call: ours first, then the peers', of which the fastest counts.
        operations: of a call.
        num_bytes: that a call reads from memory.
        arithmetic: the instruction ceiling's name and operations/s.
        read_bytes_per_s: the memory ceiling.
        in_bytes: give the rate in GB/s against memory alone, else in GOP/s.
    """
    (_, ours), *peers = seconds.items()
    peer, peer_seconds = min(peers, key=lambda named: named[1])
    if in_bytes:
        rate, unit = num_bytes / ours / 1e9, "GB/s"
        bound, ceiling = "memory", read_bytes_per_s / 1e9
    else:
        rate, unit = operations / ours / 1e9, "GOP/s"
        bound, limit = min(
            (arithmetic, ("memory", operations / num_bytes * read_bytes_per_s)), key=lambda b: b[1]
        )
        ceiling = limit / 1e9
    return Row(kernel, shape, case, ours, rate, unit, bound, ceiling, peer, peer_seconds)


def num_copies(num_bytes: int) -> int:
    """Copies of an operand that do not fit into the caches together."""
    return max(1, -(-COLD_BYTES // num_bytes))


def in_turns(calls: Mapping[str, tuple[Call, int]], effort: Effort) -> dict[str, float]:
    """Median seconds of a call of each kernel; every round gives each of them a turn.

    Args:
        calls: by name, a kernel and the number of its copies, which are used in order.
        effort: rounds and their length.
    """
    turns: dict[str, list[float]] = {name: [] for name in calls}
    copies = {name: cycle(range(count)) for name, (_, count) in calls.items()}
    counts, slow = {}, set()
    for name, (call, _) in calls.items():
        call(next(copies[name]))  # warms pages, plans and thread pools
        seconds = _seconds_of(call, copies[name], 1)
        counts[name] = max(1, round(effort.turn_s / seconds))
        if seconds > effort.slow_s:
            slow.add(name)
            turns[name].append(seconds)
    for _ in range(effort.rounds):
        for name, (call, _) in calls.items():
            if name not in slow:
                turns[name].append(_seconds_of(call, copies[name], counts[name]))
    return {name: median(seconds) for name, seconds in turns.items()}


def _seconds_of(call: Call, copies: cycle[int], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call(next(copies))
    return (time.perf_counter() - started) / count


def repeated(one: npt.NDArray[np.uint8], count: int) -> list[npt.NDArray[np.uint8]]:
    """Copies of packed weights in one allocation, each on a cache line of its own."""
    stride = -(-len(one) // 64) * 64
    memory = np.empty(count * stride + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    rows = memory[skip : skip + count * stride].reshape(count, stride)[:, : len(one)]
    rows[:] = one
    return list(rows)
