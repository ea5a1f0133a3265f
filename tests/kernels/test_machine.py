"""Threads and instruction sets follow what the machine and the user say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fuserve import _native
from fuserve._native import ThreadPool
from fuserve.errors import InvalidRequestError
from fuserve.kernels.machine import num_threads, selected_isa

CPU_SECONDS_OF_AN_IDLE_POOL = """
import resource, threading
from fuserve._native import ThreadPool
pool = ThreadPool(2)
pool.barrier_seconds(10)
threading.Event().wait(0.2)
before = resource.getrusage(resource.RUSAGE_SELF)
threading.Event().wait(1.0)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_restricted_affinity_restricts_the_threads() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); "
    code += "from fuserve.kernels.machine import num_threads; print(num_threads())"
    assert run_python(code) == "1"


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_taskset_restricts_the_threads() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = "from fuserve.kernels.machine import num_threads; print(num_threads())"
    command = ["taskset", "-c", str(cpu), sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1\n"


def test_an_idle_pool_uses_no_cpu() -> None:
    assert float(run_python(CPU_SECONDS_OF_AN_IDLE_POOL)) < 0.05


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSERVE_ISA", "sse9")
    with pytest.raises(InvalidRequestError, match=r"sse9.*available: scalar"):
        selected_isa()


@pytest.mark.parametrize("name", _native.available_isas())
def test_fuserve_isa_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FUSERVE_ISA", name)
    assert selected_isa() == name


def test_fuserve_threads_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSERVE_THREADS", "3")
    assert num_threads() == 3
    assert num_threads(1) == 1
    monkeypatch.setenv("FUSERVE_THREADS", "many")
    with pytest.raises(InvalidRequestError, match="FUSERVE_THREADS"):
        num_threads()


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_an_absurd_number_of_threads_is_refused(count: int) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 1024"):
        num_threads(count)
    with pytest.raises(ValueError, match="1 to 1024"):
        ThreadPool(count)


def test_more_threads_than_processors_still_finish() -> None:
    assert ThreadPool(5).barrier_seconds(50) > 0


def test_two_processes_that_share_the_processors_both_finish() -> None:
    code = "from fuserve._native import ThreadPool; print(ThreadPool(2).barrier_seconds(2000))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        assert all(float(process.communicate(timeout=30)[0]) > 0 for process in both)
    finally:
        for process in both:
            process.kill()
