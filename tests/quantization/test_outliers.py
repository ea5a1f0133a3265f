"""Activation outliers break naive W8A8; LLM.int8() and SmoothQuant recover."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuserve.calibration import CalibrationOptions, quantize_model
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder import ExecutorOptions, load_model
from fuserve.quantization import LayerChoice, recipe_named
from tests.parity.paging import PagedSequences
from tests.quantization.stress_model import stress_model

FLOAT32: dict[str, Any] = {
    "dtype": "float32",
    "activations": "float",
    "kv_cache_dtype": "float32",
}
PROMPT = np.random.default_rng(0).integers(3, 97, 100).tolist()

ErrorOf = Callable[..., float]


def logits(model: Path, **options: Any) -> np.ndarray:
    loaded = load_model(str(model), ExecutorOptions(max_model_len=128, max_num_seqs=1, **options))
    try:
        return PagedSequences(loaded.executor).step({"only": PROMPT})["only"]
    finally:
        loaded.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stress")
    stress_model(path)
    return path


@pytest.fixture(scope="module")
def error_of(folder: Path) -> ErrorOf:
    """Root mean square error of the logits, as a share of their spread in fp32."""
    want = logits(folder, **FLOAT32)

    def measure(model: Path = folder, **options: Any) -> float:
        got = logits(model, **({"dtype": "float32", "kv_cache_dtype": "float32"} | options))
        return float(np.sqrt(np.mean((got - want) ** 2)) / want.std())

    return measure


def test_llm_int8_recovers_what_outliers_cost_naive_w8a8(error_of: ErrorOf) -> None:
    naive = error_of(quantization="w8a8")
    recovered = error_of(quantization="llm-int8")
    print(naive, recovered, error_of(quantization="w8a8", activations="float"))
    assert recovered < naive / 3


def test_smoothquant_recovers_as_well(
    error_of: ErrorOf, folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    rng = np.random.default_rng(1)
    rows = [{"tokens": rng.integers(3, 97, 64).tolist()} for _ in range(16)]
    text.write_text("\n".join(map(json.dumps, rows)))
    smooth = tmp_path / "smooth"
    quantize_model(
        open_checkpoint(folder),
        smooth,
        LayerChoice.parse(recipe_named("smoothquant"), []),
        CalibrationOptions(num_samples=16, sample_tokens=64),
        text=text,
    )
    naive, recovered = error_of(quantization="w8a8"), error_of(smooth)
    print(naive, recovered)
    assert recovered < naive / 3


def test_a_threshold_that_nothing_exceeds_is_naive_w8a8(folder: Path) -> None:
    naive = logits(folder, quantization="w8a8")
    none = logits(folder, quantization="llm-int8", outlier_threshold=1e6)
    assert np.array_equal(none, naive)
