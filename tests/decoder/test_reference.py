"""The reference executor in other floating types, and where torch is missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fuserve.decoder.reference import ReferenceExecutor
from fuserve.decoder.step import StepBatch
from fuserve.decoder.weights import DummyWeights, spec_from_config

CONFIG = {
    "model_type": "bloom",  # ALiBi, LayerNorm and biases: the most that can go wrong by dtype
    "hidden_size": 24,
    "n_head": 3,
    "n_layer": 2,
    "vocab_size": 31,
}

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from fuserve.errors import MissingExtraError
try:
    import fuserve.decoder.reference
except MissingExtraError as error:
    print(error)
"""


def one_sequence(num_tokens: int, blocks: list[int]) -> StepBatch:
    positions = np.arange(num_tokens, dtype=np.int32)
    return StepBatch(
        tokens=positions % 31,
        positions=positions,
        query_starts=np.array([0, num_tokens], np.int32),
        block_tables=np.array([blocks], np.int32),
        logit_rows=np.array([num_tokens - 1], np.int32),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_any_floating_type_gives_nearly_the_same_logits(
    dtype: torch.dtype, tolerance: float
) -> None:
    weights = DummyWeights(spec_from_config(CONFIG))
    batch = one_sequence(40, [1, 0])
    exact = ReferenceExecutor(weights, num_blocks=2).step(batch)
    logits = ReferenceExecutor(weights, num_blocks=2, dtype=dtype).step(batch)
    assert logits.dtype == np.float32 and logits.shape == (1, 31)
    assert np.abs(logits - exact).max() < tolerance * exact.std()


def test_only_the_rows_asked_for_have_logits() -> None:
    executor = ReferenceExecutor(DummyWeights(spec_from_config(CONFIG)), num_blocks=2)
    batch = one_sequence(40, [0, 1])
    last = executor.step(batch)
    batch.logit_rows = np.array([39, 3], np.int32)
    rows = executor.step(batch)
    assert rows.shape == (2, 31)
    np.testing.assert_allclose(rows[0], last[0], rtol=1e-4, atol=1e-6)
    batch.logit_rows = np.array([], np.int32)
    assert executor.step(batch).shape == (0, 31)
    assert batch.hidden.shape == (0, 24)
    batch.hidden_rows = np.array([5], np.int32)
    executor.step(batch)
    assert batch.hidden.shape == (1, 24)


def test_without_torch_the_error_says_what_to_install() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    )
    assert "pip install 'fuserve[torch]'" in result.stdout
