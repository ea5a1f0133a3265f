"""A model in parts says what the whole model says: every family, in ranks and in stages."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import CheckpointWeights
from tests.decoder.ranks import RankedExecutor
from tests.parity.paging import NUM_BLOCKS, PagedSequences
from tests.parity.random_models import VARIANTS, random_model

FAMILIES = [
    "llama-biases-tied",
    "llama-dynamic",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2-caps",
    "gemma3",
    "phi3-partial",
    "ernie4_5-biases",
    "gpt2-untied",
    "opt",
    "opt-post-norm",
    "bloom",
    "bloom-power-of-two",
]
FLOAT = ExecutorOptions(
    dtype="float32", kv_cache_dtype="float32", activations="float", num_threads=1
)
PROMPTS = {"a": 45, "b": 7}
NUM_NEW = 6


@cache
def weights_of(name: str) -> CheckpointWeights:
    folder = TemporaryDirectory()
    FOLDERS.append(folder)
    return CheckpointWeights(open_checkpoint(random_model(name, Path(folder.name)).folder))


FOLDERS: list[TemporaryDirectory[str]] = []  # kept: the weights are views of their files


def sizes(name: str, options: ExecutorOptions) -> dict[str, object]:
    return {
        "weights": weights_of(name),
        "options": options,
        "num_blocks": NUM_BLOCKS,
        "max_model_len": VARIANTS[name].max_model_len,
    }


def run(executor: object, vocab_size: int) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Logits of two prompts in chunks, greedy tokens after them, and hidden states."""
    rng = np.random.default_rng(5)
    prompts = {name: rng.integers(3, vocab_size, size).tolist() for name, size in PROMPTS.items()}
    sequences = PagedSequences(executor)  # type: ignore[arg-type]
    logits = [sequences.step({"a": prompts["a"][:30]})["a"]]
    results = sequences.step({"a": prompts["a"][30:], "b": prompts["b"]})
    tokens = []
    for _ in range(NUM_NEW):
        logits += [results["a"], results["b"]]
        chosen = {name: [int(rows[-1].argmax())] for name, rows in results.items()}
        tokens.append([chosen["a"][0], chosen["b"][0]])
        results = sequences.step(chosen)
    hidden = np.concatenate(list(sequences.hidden.values()))
    return np.concatenate(logits), tokens, hidden


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_choose_the_tokens_of_one_rank(name: str) -> None:
    given = sizes(name, FLOAT)
    vocab_size = weights_of(name).spec.vocab_size
    logits, tokens, hidden = run(NativeExecutor(**given), vocab_size)  # type: ignore[arg-type]
    for tensor_size in (2, 4):
        ranks = RankedExecutor(tensor_size=tensor_size, **given)  # type: ignore[arg-type]
        theirs, their_tokens, their_hidden = run(ranks, vocab_size)
        assert their_tokens == tokens
        assert np.abs(theirs - logits).max() < 2e-5 * max(1.0, np.abs(logits).max())
        assert np.abs(their_hidden - hidden).max() < 2e-5 * max(1.0, np.abs(hidden).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_give_the_bits_of_the_whole(name: str) -> None:
    given = sizes(name, FLOAT)
    spec = weights_of(name).spec
    whole = run(NativeExecutor(**given), spec.vocab_size)  # type: ignore[arg-type]
    starts = range(spec.num_layers)[: 3 if spec.num_layers > 2 else 2]
    stages = RankedExecutor(tensor_size=1, stage_starts=starts, **given)  # type: ignore[arg-type]
    parts = run(stages, spec.vocab_size)
    assert parts[1] == whole[1]
    assert np.array_equal(parts[0], whole[0])
    assert np.array_equal(parts[2], whole[2])


@pytest.mark.parametrize("shares_memory", [True, False])
def test_ranks_and_stages_combine_over_memory_and_over_calls(shares_memory: bool) -> None:
    given = sizes("qwen3-biases", FLOAT)
    vocab_size = weights_of("qwen3-biases").spec.vocab_size
    logits, tokens, _ = run(NativeExecutor(**given), vocab_size)  # type: ignore[arg-type]
    ranks = RankedExecutor(
        tensor_size=2,
        stage_starts=(0, 1),
        shares_memory=shares_memory,
        **given,  # type: ignore[arg-type]
    )
    theirs, their_tokens, _ = run(ranks, vocab_size)
    assert their_tokens == tokens
    assert np.abs(theirs - logits).max() < 2e-5 * np.abs(logits).max()
