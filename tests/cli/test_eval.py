"""``fuserve eval perplexity`` on the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, RunJson

PROSE = (
    "The river rises in the mountains, where the snow melts in spring, and runs through a narrow "
    "valley to the plain. There it slows down, and the towns along its banks have lived from it "
    "for a thousand years: from fish, from mills, and from the boats that carried salt and wood.\n"
)
WINDOWS = ["--context", "32", "--stride", "16"]


@pytest.fixture
def prose(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return str(path)


def test_english_is_less_surprising_than_its_words_in_disorder(
    run_json: RunJson, prose: str, tmp_path: Path
) -> None:
    report = run_json("eval", "perplexity", "--model", "demo", "--text", prose, *WINDOWS)
    assert report["scored_tokens"] == report["text_tokens"] - 1
    assert 1 < report["perplexity"] < 60

    disorder = tmp_path / "disorder.txt"
    disorder.write_text(" ".join(sorted(PROSE.split())), encoding="utf-8")
    worse = run_json("eval", "perplexity", "--model", "demo", "--text", str(disorder), *WINDOWS)
    assert worse["perplexity"] > 4 * report["perplexity"]


def test_the_budget_of_a_step_does_not_change_the_result(run_json: RunJson, prose: str) -> None:
    command = ["eval", "perplexity", "--model", "demo", "--text", prose, *WINDOWS]
    wide = run_json(*command)
    narrow = run_json(*command, "--max-num-batched-tokens", "7", "--max-num-seqs", "2")
    assert narrow["total_nll"] == pytest.approx(wide["total_nll"], rel=1e-12)


def test_a_stride_beyond_the_context_is_refused(run: Run, prose: str) -> None:
    result = run(
        *["eval", "perplexity", "--model", "demo", "--text", prose],
        *["--context", "32", "--stride", "33"],
    )
    assert result.exit_code == 2
    assert "stride" in result.stderr


def test_a_text_that_is_missing_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "missing.txt"
    result = run("eval", "perplexity", "--model", "demo", "--text", str(path))
    assert result.exit_code == 2
    assert "missing.txt" in result.stderr


def test_schemes_are_compared_with_fp32_in_one_run(
    run_json: RunJson, prose: str, tmp_path: Path
) -> None:
    picture = tmp_path / "accuracy.png"
    report = run_json(
        *["eval", "compare", "demo", "--schemes", "float32,w8a8,int4+g32+symmetric"],
        *["--text", prose, *WINDOWS, "--plot", str(picture)],
    )
    base, same, w8a8, int4 = report["rows"]
    assert [row["scheme"] for row in report["rows"][1:]] == [
        "float32",
        "w8a8",
        "int4+g32+symmetric",
    ]
    assert base["mean_kl"] == 0 and base["top1_agreement"] == 1
    assert abs(same["perplexity_change"]) < 1e-3  # its cache and arithmetic are as they come
    assert same["mean_kl"] < w8a8["mean_kl"] < int4["mean_kl"]
    assert base["size_bytes"] > w8a8["size_bytes"] > int4["size_bytes"]
    assert all(row["prefill_tokens_per_s"] > 0 for row in report["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("schemes", ["int3", "int8+g7", ","])
def test_an_unknown_scheme_is_refused_with_those_that_are_known(
    run: Run, prose: str, schemes: str
) -> None:
    result = run("eval", "compare", "demo", "--schemes", schemes, "--text", prose)
    assert result.exit_code == 2
    assert "--schemes" in result.stderr


def test_a_scheme_that_needs_calibration_does_not_run_on_load(run: Run, prose: str) -> None:
    result = run("eval", "perplexity", "-m", "demo", "--text", prose, "-q", "gptq")
    assert result.exit_code == 2
    assert "fuserve quantize MODEL OUT --scheme gptq" in result.stderr
