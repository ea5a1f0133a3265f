"""``fuserve bench latency`` on a tiny model without a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run, RunJson

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
SIZES = ["--prompt-tokens", "40", "--output-tokens", "4", "--repeat", "1", "--threads", "1"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSERVE_CACHE", str(tmp_path / "cache"))


def test_a_shape_is_measured_without_a_file(run_json: RunJson, config: str) -> None:
    report = run_json(
        *["bench", "latency", "--model", config, "--load-format", "dummy"],
        *["--quantization", "int4", "--batch", "1,3", *SIZES],
    )
    assert [row["batch"] for row in report["decode"]] == [1, 3]
    assert report["prefill"]["tokens_per_s"] > 0
    assert report["num_threads"] == 1
    assert report["peak_rss_bytes"] > report["packed_bytes"] > 0
    # context 42: keys and values x 2 layers x 2 heads x 32 features x 2 bytes
    assert report["kv_bytes_read_per_token"] == 42 * 2 * 2 * 2 * 32 * 2
    one, three = report["decode"]
    assert three["bytes_read_per_step"] - one["bytes_read_per_step"] == pytest.approx(
        2 * report["kv_bytes_read_per_token"]
    )
    expected = (
        one["bytes_read_per_step"] / (one["step_ms"] / 1e3) / report["machine"]["read_bytes_per_s"]
    )
    assert one["bandwidth_fraction"] == pytest.approx(expected)


def test_the_memory_of_ranks_is_added_up(run_json: RunJson, run: Run, config: str) -> None:
    command = ["bench", "latency", "--model", config, "--load-format", "dummy", "--batch", "1"]
    command += ["--pipeline-parallel-size", "2", *SIZES]
    report = run_json(*command)
    peaks = report["peak_rss_bytes_of_ranks"]
    assert len(peaks) == 2 and min(peaks) > 10e6  # an interpreter
    assert report["peak_rss_bytes"] == sum(peaks)
    assert "in 2 processes" in " ".join(run(*command).stdout.split())


def test_a_table_is_printed_for_people(run: Run, config: str) -> None:
    result = run(
        *["bench", "latency", "--model", config, "--load-format", "dummy", "--batch", "2", *SIZES]
    )
    assert result.exit_code == 0, result.stderr
    assert "prefill" in result.stdout
    assert "ms/step" in result.stdout
    assert "peak memory" in result.stdout


@pytest.mark.parametrize("batch", ["", "0", "1,-2", "a"])
def test_batches_that_are_no_numbers_are_refused(run: Run, config: str, batch: str) -> None:
    result = run("bench", "latency", "--model", config, "--load-format", "dummy", "--batch", batch)
    assert result.exit_code == 2
    assert "--batch" in result.stderr


def test_a_prompt_beyond_the_model_s_length_is_refused(run: Run, config: str) -> None:
    result = run(
        *["bench", "latency", "--model", config, "--load-format", "dummy", "--batch", "1"],
        *["--prompt-tokens", "250", "--output-tokens", "64"],
    )
    assert result.exit_code == 2
    assert "256" in result.stderr
