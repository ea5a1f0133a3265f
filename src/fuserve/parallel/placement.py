"""Which CPUs each rank of this host has: its own physical cores, of one NUMA node if they fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from fuserve.kernels.machine import num_threads

SYSFS = Path("/sys/devices/system")

Cpus = frozenset[int]


def place_ranks(num_ranks: int, cpus: Cpus | None = None, sysfs: Path = SYSFS) -> list[Cpus]:
    """The CPUs of each rank; all of them for every rank where there are more ranks than cores.

    Args:
        num_ranks: ranks on this host.
        cpus: those that may be used; None is this process's.
        sysfs: where the system describes its processors.
    """
    cpus = frozenset(os.sched_getaffinity(0)) if cpus is None else cpus
    cores = _cores_by_node(cpus, sysfs)
    if num_ranks > len(cores):
        return [cpus] * num_ranks
    bounds = [len(cores) * rank // num_ranks for rank in range(num_ranks + 1)]
    return [frozenset().union(*cores[start:end]) for start, end in pairwise(bounds)]


def threads_of_ranks(num_ranks: int, requested: int | None) -> int:
    """Threads of each rank on this host.

    Args:
        num_ranks: ranks on this host.
        requested: of each rank; None shares out what this process could use.
    """
    return num_threads(requested) if requested is not None else max(1, num_threads() // num_ranks)


@contextmanager
def on_cpus(cpus: Cpus) -> Iterator[None]:
    """Threads that are started in the block stay on these CPUs; the calling one does not."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cores_by_node(cpus: Cpus, sysfs: Path) -> list[Cpus]:
    """Physical cores as sets of CPUs, those of a NUMA node next to each other."""
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in sysfs.glob("node/node[0-9]*")
        for cpu in _read_cpus(folder / "cpulist")
    }
    cores = {
        frozenset(_read_cpus(sysfs / f"cpu/cpu{cpu}/topology/thread_siblings_list")) & cpus
        or frozenset({cpu})
        for cpu in cpus
    }
    return sorted(cores, key=lambda core: (node_of.get(min(core), 0), min(core)))


def _read_cpus(file: Path) -> Iterable[int]:
    """The CPUs of a list such as ``0-3,8``; none if the system does not say."""
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return parse_cpus(text.split(",")) if text else []


def parse_cpus(parts: Sequence[str]) -> list[int]:
    """``["0-2", "8"]`` -> ``[0, 1, 2, 8]``."""
    cpus: list[int] = []
    for part in parts:
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus
