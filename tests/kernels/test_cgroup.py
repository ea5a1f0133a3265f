"""The number of threads respects the CPU time that control groups grant."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from fuserve import _native
from fuserve.kernels.machine import cgroup_quota

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"
HYBRID = "sys/fs/cgroup/unified"
GROUP = "proc/self/cgroup"


def lay_out(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str | bytes]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        ({f"{V2}/cpu.max": "max 100000\n"}, math.inf),
        (v1(V1, 200_000), 2.0),
        (v1(V1, -1), math.inf),
        ({f"{HYBRID}/cpu.max": "50000 100000\n"}, 0.5),
        ({f"{V2}/cpu.max": "150000\n"}, math.inf),
        ({}, math.inf),
    ],
    ids=["v2", "v2 unlimited", "v1", "v1 unlimited", "v2 beside v1", "cut short", "no cgroup"],
)
def test_the_quota_is_read_in_both_versions(
    tmp_path: Path, files: dict[str, str | bytes], expected: float
) -> None:
    assert _native.cgroup_quota(lay_out(tmp_path, files)) == expected


@pytest.mark.parametrize("tightest", ["", "/pods", "/pods/pod7", "/pods/pod7/engine"])
def test_the_tightest_group_on_the_way_to_the_root_counts(tmp_path: Path, tightest: str) -> None:
    groups = ["", "/pods", "/pods/pod7", "/pods/pod7/engine"]
    files: dict[str, str | bytes] = {GROUP: "0::/pods/pod7/engine\n"}
    files |= {f"{V2}{group}/cpu.max": "400000 100000\n" for group in groups}
    files[f"{V2}/pods/pod8/cpu.max"] = "1000 100000\n"  # a neighbour's
    files[f"{V2}{tightest}/cpu.max"] = "120000 100000\n"
    assert _native.cgroup_quota(lay_out(tmp_path, files)) == 1.2


def test_groups_of_version_1_are_followed_for_cpu_time_only(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        GROUP: "4:cpuset,cpuacct:/set\n3:cpuacct,cpu:/time/inner\n1:name=systemd:/cpu\n"
    }
    files |= v1(f"{V1}/time", 300_000) | v1(f"{V1}/time/inner", -1)
    files |= v1(f"{V1}/set", 10_000) | v1(f"{V1}/cpu", 10_000)
    assert _native.cgroup_quota(lay_out(tmp_path, files)) == 3.0


@pytest.mark.parametrize(
    "content",
    [
        *("", "\n", "lots 100000", "-2", "150000 0", "-1 100000", "0 100000", "nan inf"),
        *("1e999 100000", "15x 100000", "150000 -5", b"\xff\xfe\x00\x01 \x00", "9" * 10_000),
    ],
)
def test_a_file_that_makes_no_sense_is_no_limit(tmp_path: Path, content: str | bytes) -> None:
    names = (f"{V2}/cpu.max", f"{V1}/cpu.cfs_quota_us", f"{V1}/cpu.cfs_period_us")
    root = lay_out(tmp_path, dict.fromkeys(names, content))
    assert _native.cgroup_quota(root) == math.inf
    assert _native.usable_threads(root) >= 1


@pytest.mark.parametrize("line", ["", ":", "0:", "0::", "::a", "0::relative", "0::/../..", "///"])
def test_a_list_of_groups_that_makes_no_sense_is_passed_over(tmp_path: Path, line: str) -> None:
    files: dict[str, str | bytes] = {GROUP: f"{line}\n", f"{V2}/cpu.max": "200000 100000\n"}
    assert _native.cgroup_quota(lay_out(tmp_path, files)) == 2.0


@pytest.mark.parametrize(("quota", "threads"), [(1, 1), (99_999, 1), (100_000, 1), (10**12, None)])
def test_threads_are_the_quota_rounded_up_and_no_more_than_allowed(
    tmp_path: Path, quota: int, threads: int | None
) -> None:
    root = lay_out(tmp_path, {f"{V2}/cpu.max": f"{quota} 100000\n"})
    assert _native.usable_threads(root) == (threads or len(os.sched_getaffinity(0)))


def test_hyper_threads_of_a_core_count_once(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": "0-1023\n"
        for cpu in os.sched_getaffinity(0)
    }
    assert _native.usable_threads(lay_out(tmp_path, files)) == 1


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A real control group with half a processor, where this machine lets us make one."""
    name = f"fuserve-test-{uuid4().hex}"
    for mount, quota in ((Path("/", V1), "cpu.cfs_quota_us"), (Path("/", V2), "cpu.max")):
        group = mount / name
        if not (mount / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / quota).write_text("50000" if mount == Path("/", V1) else "50000 100000")
            yield group
            return
        except OSError:
            continue  # version 2 offers no CPU time below a group that has processes itself
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here")


def test_a_process_in_a_limited_group_gets_its_share(limited_group: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path;"
        "(Path(sys.argv[1]) / 'cgroup.procs').write_text(str(os.getpid()));"
        "from fuserve.kernels.machine import cgroup_quota, num_threads;"
        "print(cgroup_quota(), num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FUSERVE_THREADS"}
    command = [sys.executable, "-c", code, str(limited_group)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["0.5", "1"]


def test_no_limit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cgroup_quota", lambda: math.inf)
    assert cgroup_quota() is None
