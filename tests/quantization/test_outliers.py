"""Activation outliers break naive W8A8; LLM.int8() and SmoothQuant recover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuserve.calibration import CalibrationOptions, quantize_model
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder import ExecutorOptions, load_model
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.reference import ReferenceExecutor
from fuserve.decoder.weights import CheckpointWeights
from fuserve.quantization import LayerChoice, recipe_named
from tests.calibration.small_models import write_text
from tests.parity.paging import PagedSequences
from tests.quantization.stress_model import stress_model

FLOAT32: dict[str, Any] = {
    "dtype": "float32",
    "activations": "float",
    "kv_cache_dtype": "float32",
}
PROMPT = np.random.default_rng(0).integers(3, 97, 100).tolist()

ErrorOf = Callable[..., float]
Quantize = Callable[[str], Path]


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
def quantize(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """The model in a scheme, calibrated on a text, and written to a folder."""
    text = write_text(tmp_path_factory.mktemp("text"))
    options = CalibrationOptions(num_samples=16, sample_tokens=32)
    written: dict[str, Path] = {}

    def run(scheme: str) -> Path:
        if scheme not in written:
            written[scheme] = tmp_path_factory.mktemp(scheme) / "model"
            choice = LayerChoice.parse(recipe_named(scheme), [])
            quantize_model(open_checkpoint(folder), written[scheme], choice, options, text=text)
        return written[scheme]

    return run


@pytest.fixture(scope="module")
def error_of(folder: Path) -> ErrorOf:
    """Root mean square error of the logits, as a share of their spread in fp32."""
    want = logits(folder, **FLOAT32)

    def measure(model: Path = folder, **options: Any) -> float:
        plain = {"dtype": "float32"} if options else {}
        got = logits(model, **plain, kv_cache_dtype="float32", **options)
        return float(np.sqrt(np.mean((got - want) ** 2)) / want.std())

    return measure


def test_llm_int8_recovers_what_outliers_cost_naive_w8a8(error_of: ErrorOf) -> None:
    naive = error_of(quantization="w8a8")
    recovered = error_of(quantization="llm-int8")
    assert recovered < naive / 3


@pytest.mark.parametrize(
    ("scheme", "naive", "gain"),
    [("smoothquant", "w8a8", 3.0), ("smoothquant-static", "w8a8-static", 1.5)],
)
def test_smoothquant_recovers_as_well(
    error_of: ErrorOf, quantize: Quantize, scheme: str, naive: str, gain: float
) -> None:
    assert error_of(quantize(scheme)) < error_of(quantize(naive)) / gain


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "llm-int8", "smoothquant-static"])
def test_the_kernels_round_as_the_reference_does(quantize: Quantize, scheme: str) -> None:
    weights = CheckpointWeights(open_checkpoint(quantize(scheme)))
    want, got = (
        PagedSequences(executor).step({"only": PROMPT})["only"]
        for executor in (
            ReferenceExecutor(weights, num_blocks=8),
            NativeExecutor(
                weights,
                ExecutorOptions(kv_cache_dtype="float32", dtype="auto"),
                num_blocks=8,
                max_model_len=128,
            ),
        )
    )
    # A value halfway between two codes may round either way.
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.01 * want.std()


def test_a_threshold_that_nothing_exceeds_is_naive_w8a8(folder: Path) -> None:
    naive = logits(folder, quantization="w8a8")
    none = logits(folder, quantization="llm-int8", outlier_threshold=1e6)
    assert np.array_equal(none, naive)
