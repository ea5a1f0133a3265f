"""``fuserve info`` tells what a model is from its headers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.cli.conftest import Run, RunJson


def test_the_demo_model_is_described(run_json: RunJson) -> None:
    report = run_json("info", "demo")
    assert report["format"] == "gguf"
    assert report["architecture"]["family"] == "llama"
    assert report["architecture"]["layers"] == 30
    assert report["parameters"] == 134_515_008
    assert report["dtypes"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert report["regridded_dtypes"] == []
    assert report["context_length"] == 8192
    # keys and values x 30 layers x 3 heads x 64 features x 1000 tokens
    assert report["kv_cache_bytes_per_1k_tokens"]["float16"] == 2 * 30 * 3 * 64 * 1000 * 2
    assert report["tokenizer"]["chat_template"] is True
    weights = report["weight_bytes"]
    assert weights["int4_with_embeddings"] < weights["file"] < weights["int8"]
    assert weights["as_stored"] == pytest.approx(weights["file"], rel=0.01)  # the grids are kept


def test_a_person_reads_the_same(run: Run) -> None:
    result = run("info", "demo")
    assert result.exit_code == 0
    assert "134.5 M" in result.stdout
    assert "with chat template" in result.stdout
    assert "rounded again" not in result.stdout


def test_k_quants_are_announced_to_be_rounded_again(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "k-quants.gguf"
    write_llama(path, gguf.GGMLQuantizationType.Q6_K)
    result = run("info", str(path))
    assert result.exit_code == 0, result.stderr
    assert "Q6_K weights are rounded again" in result.stdout
    assert "none:" in result.stdout  # the file has no tokenizer


def test_no_weight_is_read(run_json: RunJson, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("fuserve.checkpoints.gguf_file.GgufFile.tensor", refuse)
    assert run_json("info", "demo")["parameters"] == 134_515_008


def write_llama(path: Path, matrices: gguf.GGMLQuantizationType) -> None:
    """A Llama of one layer whose matrices have one block type; all weights are zero."""
    writer = gguf.GGUFWriter(path, "llama")
    hidden = 256
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    values, size = gguf.GGML_QUANT_SIZES[matrices]
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", *(f"blk.0.{name}" for name in names)]:
        rows = 64 if name == "token_embd" else hidden
        blocks = np.zeros((rows, hidden // values * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=matrices)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
