"""``fuserve doctor`` reads the machine's limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuserve.cli.doctor import cgroup_quota, cpu_features
from tests.cli.conftest import RunJson


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=["v2", "v2 unlimited", "v1", "v1 unlimited", "no cgroup"],
)
def test_the_cgroup_s_quota_is_read_in_both_versions(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cgroup_quota(tmp_path) == expected


def test_features_are_found_by_whole_names(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags\t\t: fpu avx avx2 avx512_vnni_not fma\n")
    assert cpu_features(path) == ["avx2", "fma"]
    assert cpu_features(tmp_path / "missing") == []


def test_the_machine_is_measured(run_json: RunJson) -> None:
    report = run_json("doctor", "--threads", "1")
    assert report["machine"]["isa"] in report["machine"]["available_isas"]
    assert report["measured_threads"] == 1
    assert 1e8 < report["read_bytes_per_s"] < 1e13
    assert 1e8 < report["fp32_flop_per_s"] < 1e14
    assert report["versions"]["numpy"]
    assert report["extras"]["demo"] is True
