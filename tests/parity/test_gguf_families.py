"""A model converted to GGUF as llama.cpp does it has the logits of the original."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fuserve.architectures import GGUF_FAMILIES
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.weights import CheckpointWeights
from tests.parity.gguf_files import write_gguf
from tests.parity.paging import PagedSequences, build_executor
from tests.parity.random_models import VARIANTS, random_model
from tests.parity.test_families import (
    EXECUTORS,
    assert_close,
    expected_logits,
    prompt,
)

CONVERTED = (
    "llama",
    "llama-biases-tied",
    "llama-linear",
    "llama-yarn",
    "llama-llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-biases",
    "gemma2",
    "gemma2-caps",
    "gemma3",
    "gemma3-scaled",
    "phi3",
    "phi3-window",
    "phi3-partial",
    "phi3-longrope-short",
    "phi3-longrope-long",
    "ernie4_5",
    "ernie4_5-biases",
    "gpt2",
    "bloom",
    "bloom-power-of-two",
)

# GGUF has no field for query_pre_attn_scalar; for most sizes it is the head's.
GEMMA_SCALES = {"query_pre_attn_scalar": 24}


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_has_the_logits_of_the_original(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = random_model(name, tmp_path / "original", **(GEMMA_SCALES if "gemma" in name else {}))
    path = tmp_path / "converted.gguf"
    write_gguf(model, path)
    weights = CheckpointWeights(open_checkpoint(path))
    sequences = PagedSequences(build_executor(kind, weights, model.variant.max_model_len))
    for length in model.variant.lengths[-2:]:
        tokens = prompt(model, length)
        logits = sequences.step({f"{length} tokens": tokens})[f"{length} tokens"]
        assert_close(logits, expected_logits(model, tokens))


def test_quantized_blocks_reach_the_executor_as_they_are_stored(tmp_path: Path) -> None:
    """Stacked projections are cut between rows, so that no quantized block is ever opened."""
    model = random_model("phi3", tmp_path / "original", hidden_size=96, intermediate_size=64)
    path = tmp_path / "quantized.gguf"
    write_gguf(model, path, gguf.GGMLQuantizationType.Q8_0)
    weights = CheckpointWeights(open_checkpoint(path))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        tensor = weights.tensor(f"layers.1.{name}")
        assert tensor.dtype == "Q8_0"
        assert tensor.data.shape[0] == tensor.shape[0]

    tokens = prompt(model, 33)
    logits = PagedSequences(build_executor("reference", weights, 160)).step({"only": tokens})
    expected = expected_logits(model, tokens)
    correlation = np.corrcoef(logits["only"].ravel(), expected.ravel())[0, 1]
    assert correlation > 0.999


def test_the_variants_cover_every_gguf_architecture() -> None:
    families = {name.split("-")[0] for name in CONVERTED}
    assert set(GGUF_FAMILIES) <= families
    assert set(CONVERTED) <= set(VARIANTS)
