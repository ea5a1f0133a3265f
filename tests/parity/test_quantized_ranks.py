"""Checkpoints that are quantized already, in ranks: their grids and vectors are cut, not lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fuserve.calibration import CalibrationOptions, quantize_model
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import CheckpointWeights
from fuserve.quantization import LayerChoice, recipe_named
from fuserve.quantization.smoothquant import Smoothing
from tests.calibration.small_models import sized_model, write_text
from tests.decoder.ranks import RankedExecutor
from tests.parity.paging import NUM_BLOCKS, PagedSequences

TOKENS = np.random.default_rng(0).integers(3, 90, 40).tolist()
CALIBRATION = CalibrationOptions(
    num_samples=6, sample_tokens=32, smoothing=Smoothing(alpha=0.5, shift=True)
)
FLOAT = ExecutorOptions(activations="float", kv_cache_dtype="float32", num_threads=1)
STORED = ExecutorOptions(kv_cache_dtype="float32", num_threads=1)
INVARIANT = ExecutorOptions(kv_cache_dtype="float32", num_threads=1, rank_invariant=True)


def logits(folder: Path, options: ExecutorOptions, tensor_size: int) -> np.ndarray:
    weights = CheckpointWeights(open_checkpoint(folder))
    ranks = RankedExecutor(weights, options, tensor_size, num_blocks=NUM_BLOCKS, max_model_len=128)
    return PagedSequences(ranks).step({"only": TOKENS})["only"]


@pytest.mark.parametrize(
    ("family", "scheme", "group_size"),
    [
        ("llama", "gptq", 32),
        ("llama", "awq", 128),  # groups of 128 are cut at heads of 16: told in groups of 32
        ("llama", "int8", 64),
        ("llama", "llm-int8", None),
        ("llama", "w8a8-static", None),
        ("bloom", "smoothquant", None),  # smoothing and shift of the down projection at run time
        ("opt", "smoothquant-static", None),
    ],
)
def test_a_quantized_folder_runs_in_ranks(
    family: str, scheme: str, group_size: int | None, tmp_path: Path
) -> None:
    sized_model(family, tmp_path / "model")
    choice = LayerChoice.parse(recipe_named(scheme, group_size), ())
    folder, text = tmp_path / "quantized", write_text(tmp_path)
    quantize_model(open_checkpoint(tmp_path / "model"), folder, choice, CALIBRATION, text=text)
    one, two = (logits(folder, FLOAT, size) for size in (1, 2))
    assert np.abs(two - one).max() < 1e-4 * one.std()
    one, two = (logits(folder, STORED, size) for size in (1, 2))
    assert np.abs(two - one).max() < 0.3 * one.std()
    one, two, four = (logits(folder, INVARIANT, size) for size in (1, 2, 4))
    assert np.array_equal(one, two)
    assert np.array_equal(one, four)
