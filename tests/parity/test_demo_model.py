"""SmolLM2-135M, the packaged demo model, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fuserve.checkpoints import Checkpoint, Tokenizer, load_tokenizer, open_checkpoint
from fuserve.decoder import ExecutorOptions, load_model
from tests.parity.paging import PagedSequences

OPTIONS = ExecutorOptions(max_model_len=2048, max_num_seqs=4)
FLOAT32 = replace(OPTIONS, dtype="float32")
BEGINNINGS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "To make bread you need",
    "SELECT name FROM",
    "The mitochondria is",
    "Dear Sir or Madam,",
    "A list of planets:\n1.",
    "Photosynthesis is the process by which",
    "He looked at the sea and",
    "import numpy as np\n",
    "The quick brown fox",
    "Question: What is 2 + 2?\nAnswer:",
    "La vie est",
    "Machine learning models are",
    "It was a dark and stormy night;",
    "The opposite of hot is",
)
NUM_GREEDY_TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Iterator[PreTrainedModel]:
    folder, file = checkpoint.path.parent, checkpoint.path.name
    yield AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prose_ids(tokenizer: Tokenizer, prose: str) -> list[int]:
    return tokenizer.encode(prose)[:1024]


def native_logits(options: ExecutorOptions, tokens: list[int]) -> npt.NDArray[np.float32]:
    model = load_model("demo", options)
    return PagedSequences(model.executor).step({"a": tokens})["a"]


def oracle_logits(oracle: PreTrainedModel, tokens: list[int]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0].numpy()


def mean_loss(logits: npt.NDArray[np.float32], tokens: list[int]) -> float:
    """Mean negative log-likelihood of each token given those before it."""
    scores = logits[:-1].astype(np.float64)
    top = scores.max(axis=1)
    log_sums = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return float((log_sums - scores[np.arange(len(tokens) - 1), tokens[1:]]).mean())


def test_fp32_logits_are_those_of_transformers(
    oracle: PreTrainedModel, prose_ids: list[int]
) -> None:
    tokens = prose_ids[:301]
    want = oracle_logits(oracle, tokens)
    error = np.abs(native_logits(FLOAT32, tokens) - want).max() / want.std()
    assert error < 1e-4


def test_greedy_tokens_are_those_of_transformers(
    oracle: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """transformers would choose each of our tokens, so it generates the same text."""
    sequences = PagedSequences(load_model("demo", FLOAT32).executor)
    prompts = [tokenizer.encode(text) for text in BEGINNINGS]
    for number, ids in enumerate(prompts):
        chosen: list[int] = []
        fed = ids
        for _ in range(NUM_GREEDY_TOKENS):
            logits = sequences.step({str(number): fed})[str(number)]
            chosen.append(int(logits[-1].argmax()))
            fed = chosen[-1:]
        want = oracle_logits(oracle, ids + chosen)[len(ids) - 1 : -1].argmax(axis=1)
        assert chosen == want.tolist(), BEGINNINGS[number]


def test_the_own_grid_of_a_q4_1_file_loses_nothing_but_activation_rounding(
    prose_ids: list[int],
) -> None:
    tokens = prose_ids[:512]
    want = native_logits(FLOAT32, tokens)
    exact = replace(OPTIONS, activations="float", kv_cache_dtype="float32")
    error = np.abs(native_logits(exact, tokens) - want).max() / want.std()
    assert error < 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("the file's own grids", OPTIONS),
        ("int8 in groups of 128", replace(OPTIONS, quantization="int8")),
        ("bfloat16", replace(OPTIONS, dtype="bfloat16")),
    ],
)
def test_quantized_perplexity_stays_within_half_a_percent(
    name: str, options: ExecutorOptions, prose_ids: list[int]
) -> None:
    base = mean_loss(native_logits(FLOAT32, prose_ids), prose_ids)
    loss = mean_loss(native_logits(options, prose_ids), prose_ids)
    assert np.exp(loss - base) < 1.005, name


MODES = {
    "own grids": OPTIONS,
    "float32": FLOAT32,
    "bfloat16": replace(OPTIONS, dtype="bfloat16"),
    "int8": replace(OPTIONS, quantization="int8", quantize_embeddings=True),
    "int4": replace(OPTIONS, quantization="int4", quantize_embeddings=True),
    "int4 symmetric": replace(OPTIONS, quantization="int4", group_size=32, symmetric=True),
    "float activations": replace(OPTIONS, activations="float"),
    "w8a8": replace(OPTIONS, quantization="w8a8", quantize_embeddings=True),
    "llm-int8": replace(OPTIONS, quantization="llm-int8", outlier_threshold=2.0),
    "some layers": replace(
        OPTIONS, quantization="w8a8", quantize_layers=("*.v=keep", "*.gate=int4", "*.o=llm-int8")
    ),
    "int8 cache": replace(OPTIONS, kv_cache_dtype="int8"),
    "int4 cache": replace(OPTIONS, kv_cache_dtype="int4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_bit_identical_alone_batched_chunked_and_on_any_number_of_threads(
    mode: str, prose_ids: list[int]
) -> None:
    prompts = {str(i): prose_ids[40 * i : 40 * i + 5 + 13 * i] for i in range(8)}
    one = PagedSequences(load_model("demo", replace(MODES[mode], num_threads=1)).executor)
    alone = {name: one.step({name: ids})[name] for name, ids in prompts.items()}

    two = load_model("demo", replace(MODES[mode], num_threads=2)).executor
    hidden = one.hidden["7"]
    batched = PagedSequences(two, seed=1)
    together = batched.step(prompts)
    for name, logits in alone.items():
        assert np.array_equal(together[name], logits), "batched"
    assert np.array_equal(batched.hidden["7"], hidden), "hidden states, batched"

    chunked = PagedSequences(two, seed=2)
    ids = prompts["7"]
    start = 0
    for size in (1, 33, 2, 31, 17, 1, len(ids)):
        chunk = ids[start : start + size]
        if not chunk:
            break
        others = {"3": prompts["3"][start : start + 1]} if start < len(prompts["3"]) else {}
        got = chunked.step({"7": chunk, **others})["7"]
        assert np.array_equal(got, alone["7"][start : start + len(chunk)]), f"chunk at {start}"
        assert np.array_equal(chunked.hidden["7"], hidden[start : start + len(chunk)])
        start += size
