"""``fuserve plan`` shows what fits where, with its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuserve.cli.quantities import parse_bytes, parse_rate, parse_seconds
from fuserve.errors import InvalidRequestError
from tests.cli.conftest import Run, RunJson
from tests.planning.shapes import CONFIGS

CEILINGS = {
    "measured_threads": 2,
    "read_bytes_per_s": 20e9,
    "fp32_flop_per_s": 100e9,
    "int8_op_per_s": 200e9,
    "int4_op_per_s": 300e9,
}
OPT = str(CONFIGS / "opt-175b.json")


@pytest.fixture
def machine(tmp_path: Path) -> str:
    file = tmp_path / "doctor.json"
    file.write_text(json.dumps(CEILINGS))
    return str(file)


def test_175_billion_parameters_are_planned_without_weights(
    run_json: RunJson, machine: str
) -> None:
    given = ("--memory", "16GB", "--hosts", "16", "--max-num-seqs", "4", "--machine", machine)
    report = run_json("plan", OPT, *given)
    assert report["parameters"] == pytest.approx(175e9, rel=0.005)
    assert report["schemes"]["f16"]["weight_bytes"] == pytest.approx(350e9, rel=0.005)
    assert {one["scheme"] for one in report["candidates"]} == {"int4", "int8"}
    best = report["candidates"][0]
    assert best["tensor_parallel"] * best["pipeline_parallel"] * best["replicas"] <= 16
    assert all(stage["memory"]["total"] <= 16e9 for stage in best["stages"])


def test_the_printed_lines_add_up(run: Run, machine: str) -> None:
    given = ("--memory", "64GB", "--hosts", "4", "--machine", machine, "-q", "int4")
    result = run("plan", OPT, *given)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("decode, one stream"))
    stated = float(lines[start].split(": ")[1].removesuffix(" ms"))
    terms = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        terms.append(float(line.split(" ms")[0]))
    assert len(terms) > 4
    assert sum(terms) == pytest.approx(stated, rel=1e-3)


def test_the_demo_model_fits_this_machine(run_json: RunJson, machine: str) -> None:
    report = run_json("plan", "demo", "--machine", machine)
    assert report["hosts"] == 1
    assert [one["scheme"] for one in report["candidates"]] == ["int4", "q4_1", "int8"]


def test_too_little_memory_says_how_many_hosts_would_do(run: Run, machine: str) -> None:
    result = run("plan", OPT, "--memory", "16GB", "--hosts", "4", "--machine", machine)
    assert result.exit_code == 2
    assert "nothing fits 4 x 16 GB" in result.stderr
    assert "such hosts" in result.stderr


def test_a_report_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    file.write_text(json.dumps(CEILINGS | {"read_bytes_per_s": 0}))
    result = run("plan", OPT, "--machine", str(file))
    assert result.exit_code == 2
    assert "read_bytes_per_s is 0" in result.stderr


def test_sizes_rates_and_times_have_units() -> None:
    assert parse_bytes("--memory", "16GB") == 16 * 10**9
    assert parse_bytes("--memory", "16GiB") == 16 << 30
    assert parse_bytes("--memory", "1.5 g") == 1_500_000_000
    assert parse_bytes("--memory", "4096") == 4096
    assert parse_rate("--bandwidth", "10Gbit/s") == 1.25e9
    assert parse_rate("--bandwidth", "10Gbit") == 1.25e9
    assert parse_rate("--bandwidth", "1.2GB/s") == 1.2e9
    assert parse_seconds("--latency", "50us") == pytest.approx(50e-6)
    with pytest.raises(InvalidRequestError, match="--memory is '16 apples'"):
        parse_bytes("--memory", "16 apples")
    with pytest.raises(InvalidRequestError, match="--bandwidth is '10'"):
        parse_rate("--bandwidth", "10")
    with pytest.raises(InvalidRequestError, match="--latency is '0us'"):
        parse_seconds("--latency", "0us")
