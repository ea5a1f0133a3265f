"""``fuserve doctor`` reads the machine's limits."""

from __future__ import annotations

from pathlib import Path

from fuserve.cli.doctor import cpu_features
from tests.cli.conftest import RunJson


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
