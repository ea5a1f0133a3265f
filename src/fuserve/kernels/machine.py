"""Instruction sets, threads, and the machine's measured ceilings."""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from fuserve import _native
from fuserve._native import ThreadPool
from fuserve.errors import InvalidRequestError

BANDWIDTH_BYTES = 512 * 1024 * 1024
"""Memory streamed over when bandwidth is measured: far more than any cache holds."""


def selected_isa() -> str:
    """The instruction set in use: ``FUSERVE_ISA``, or the best this machine has.

    Raises:
        InvalidRequestError: ``FUSERVE_ISA`` names a set that is not available here.
    """
    try:
        return str(_native.select_isa(os.environ.get("FUSERVE_ISA", "")))
    except ValueError as error:
        raise InvalidRequestError(f"FUSERVE_ISA: {error}") from error


def num_threads(requested: int | None = None) -> int:
    """Threads to use: as requested, ``FUSERVE_THREADS``, or one for each usable physical core.

    Raises:
        InvalidRequestError: the number is not between 1 and 1024.
    """
    if requested is None:
        text = os.environ.get("FUSERVE_THREADS")
        if text is None:
            return int(_native.usable_threads())
        if not text.isdecimal():
            raise InvalidRequestError(f"FUSERVE_THREADS must be a number, got {text!r}")
        requested = int(text)
    if not 1 <= requested <= 1024:
        raise InvalidRequestError(f"the number of threads must be 1 to 1024, got {requested}")
    return requested


def cgroup_quota() -> float | None:
    """CPUs' worth of time that the control groups leave this process; None without a limit."""
    quota = float(_native.cgroup_quota())
    return quota if math.isfinite(quota) else None


@cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_report() -> dict[str, Any]:
    """What the kernels run on: CPU, instruction sets, threads."""
    return {
        "cpu": cpu_name(),
        "isa": selected_isa(),
        "available_isas": list(_native.available_isas()),
        "num_threads": num_threads(),
        "affinity_cpus": len(os.sched_getaffinity(0)),
        "logical_cpus": os.cpu_count(),
    }


def measure_bandwidth(threads: int) -> float:
    """Bytes a second that ``threads`` threads read from memory, streaming."""
    pool = ThreadPool(threads)
    return float(_native.read_bandwidth(selected_isa(), pool, BANDWIDTH_BYTES, 5))


def measure_fp32(threads: int) -> float:
    """fp32 operations a second of ``threads`` threads' multiply-adds."""
    return float(_native.fp32_rate(selected_isa(), ThreadPool(threads)))


def measure_byte_dot(threads: int, *, int4: bool) -> float:
    """Operations a second of the int8 x int4 (or int8) block dot product on cached data."""
    return float(_native.byte_dot_rate(selected_isa(), ThreadPool(threads), int4))


def measure_row_dot(threads: int) -> float:
    """Operations a second of the dot product of whole int8 rows (W8A8) on cached data."""
    return float(_native.row_dot_rate(selected_isa(), ThreadPool(threads)))
