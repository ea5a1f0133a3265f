"""Parts of models: how sizes are divided, what a part weighs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.decoder.load import cache_file, part_bytes
from fuserve.decoder.model_part import ModelPart
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import Shard
from fuserve.decoder.slices import slices, split
from fuserve.decoder.step import StepBatch
from fuserve.decoder.weights import CheckpointWeights, DummyWeights, spec_from_config
from fuserve.errors import InvalidRequestError
from fuserve.kernels.exchange import ExchangeError
from tests.decoder.ranks import RankedExecutor, SharedCommunicator, shared_memory
from tests.parity.paging import NUM_BLOCKS, PagedSequences

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 203,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TOKENS = np.random.default_rng(0).integers(0, 203, 37).tolist()


def small(**changes: Any) -> DummyWeights:
    return DummyWeights(spec_from_config(SMALL | changes))


def logits(weights: DummyWeights, options: ExecutorOptions, tensor_size: int) -> np.ndarray:
    options = replace(options, num_threads=1)
    sizes: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "max_model_len": 256}
    executor = RankedExecutor(weights, options, tensor_size, **sizes)
    sequences = PagedSequences(executor)
    prompt = sequences.step({"a": TOKENS})["a"]
    return np.concatenate([prompt, sequences.step({"a": [int(prompt[-1].argmax())]})["a"]])


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantization": "int8", "group_size": 32, "quantize_embeddings": True},
        {"quantization": "int4"},
        {"quantization": "int4", "activations": "float"},
        {"quantization": "w8a8"},
        {"quantization": "llm-int8", "outlier_threshold": 1.5},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 5, "num_key_value_heads": 1}])
def test_one_two_and_four_ranks_give_the_same_bits_where_that_is_asked_for(
    given: dict[str, Any], changes: dict[str, Any]
) -> None:
    options = ExecutorOptions(**given, rank_invariant=True)
    one, two, four = (logits(small(**changes), options, size) for size in (1, 2, 4))
    assert np.isfinite(one).all()
    assert np.array_equal(one, two)
    assert np.array_equal(one, four)


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-5),
        ({"dtype": "float16"}, 1e-5),
        ({"quantization": "int8", "group_size": 32}, 0.02),
        ({"quantization": "int4", "group_size": 32}, 0.02),
        # Scales of whole rows are found for each rank's share of the row.
        ({"quantization": "w8a8"}, 0.15),
        ({"quantization": "llm-int8"}, 0.15),
    ],
)
@pytest.mark.parametrize("tensor_size", [2, 3])
def test_ranks_agree_with_one_rank_within_rounding(
    given: dict[str, Any], tolerance: float, tensor_size: int
) -> None:
    options = ExecutorOptions(**given, kv_cache_dtype="float32")
    one, several = (logits(small(), options, size) for size in (1, tensor_size))
    assert np.abs(several - one).max() < tolerance * one.std()


def test_shares_of_two_ranks_are_those_of_four_in_pairs() -> None:
    for heads, kv_heads in ((9, 3), (8, 8), (32, 8), (6, 1), (71, 1)):
        attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        spec = spec_from_config(SMALL | attention)
        two, four = slices(spec, 2), slices(spec, 4)
        for field in ("heads", "feed_forward", "vocabulary"):
            halves, quarters = getattr(two, field), getattr(four, field)
            assert [half.stop for half in halves] == [part.stop for part in quarters[1::2]]
            assert halves[0].start == quarters[0].start == 0
        for size in (2, 3, 4):
            for mine, shared in zip(
                slices(spec, size).heads, slices(spec, size).kv_heads, strict=False
            ):
                group = heads // kv_heads
                assert {head // group for head in mine} == set(shared)


def test_shares_cover_everything_and_differ_by_one() -> None:
    for count in range(1, 40):
        for num in range(1, 9):
            parts = split(range(count), num)
            assert [unit for part in parts for unit in part] == list(range(count))
            if num in (2, 4, 8):
                assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("changes", "tensor_size", "complaint"),
    [
        ({}, 10, "too many for num_heads 9.*at most 9"),
        ({"intermediate_size": 30}, 3, "too many for the feed-forward size 30.*at most 2"),
        ({"vocab_size": 20}, 4, "too many for vocab_size 20.*at most 2"),
    ],
)
def test_more_ranks_than_shares_are_refused(
    changes: dict[str, Any], tensor_size: int, complaint: str
) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        ModelPart(small(**changes).spec, Shard(0, tensor_size))


def test_three_ranks_cannot_be_rank_invariant() -> None:
    with pytest.raises(InvalidRequestError, match="1, 2 and 4"):
        ModelPart(small().spec, Shard(0, 3), rank_invariant=True)


def test_stages_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="2 layers"):
        ModelPart(small().spec, Shard(first_layer=1, end_layer=3))
    with pytest.raises(InvalidRequestError, match="at least one"):
        Shard(first_layer=1, end_layer=1)


def test_a_shard_needs_the_communicator_of_its_rank() -> None:
    with pytest.raises(InvalidRequestError, match="rank 1 of 2, but the communicator of rank 0"):
        NativeExecutor(
            small(), ExecutorOptions(), num_blocks=1, max_model_len=32, shard=Shard(1, 2)
        )


@pytest.mark.parametrize(
    "shard", [Shard(0, 2), Shard(1, 2), Shard(0, 1, 0, 8), Shard(0, 1, 8)], ids=str
)
def test_half_of_the_billion_parameter_shape_weighs_at_most_three_fifths(shard: Shard) -> None:
    config: Mapping[str, Any] = json.loads((CONFIGS / "llama-1b.json").read_text())
    weights = DummyWeights(spec_from_config(config))
    options = ExecutorOptions(quantization="int4", quantize_embeddings=True)
    whole, half = part_bytes(weights, options), part_bytes(weights, options, shard)
    assert half[0] <= 0.6 * whole[0]
    assert half[1] <= 0.5 * whole[1]


def test_each_part_has_a_packed_file_of_its_own() -> None:
    checkpoint = open_checkpoint("demo")
    shards = (Shard(), Shard(0, 2), Shard(1, 2), Shard(0, 1, 0, 3), Shard(0, 1, 3))
    options = (ExecutorOptions(), ExecutorOptions(rank_invariant=True))
    files = {cache_file(checkpoint, one, shard) for one in options for shard in shards}
    assert len(files) == 10


def test_a_rank_without_the_others_ends_its_step_with_an_error() -> None:
    memory = shared_memory(2, 1024)
    alone = SharedCommunicator(memory, 0, 2, 1024, timeout_s=0.05)
    executor = NativeExecutor(
        small(),
        ExecutorOptions(num_threads=2),
        num_blocks=NUM_BLOCKS,
        max_model_len=256,
        shard=Shard(0, 2),
        communicator=alone,
    )
    for _ in range(2):  # and again: the executor does not lock up
        with pytest.raises(ExchangeError, match="rank 1 did not come"):
            PagedSequences(executor).step({"a": TOKENS})


def test_an_error_of_the_communicator_ends_the_step_with_it() -> None:
    class Broken:
        rank, size, shared = 1, 2, None

        def all_reduce(self, array: np.ndarray) -> None:
            raise ConnectionResetError("the peer has gone")

        def gather(self, parts: object) -> None:
            raise AssertionError

    executor = NativeExecutor(
        small(),
        ExecutorOptions(num_threads=2),
        num_blocks=NUM_BLOCKS,
        max_model_len=256,
        shard=Shard(1, 2),
        communicator=Broken(),
    )
    with pytest.raises(ConnectionResetError, match="the peer has gone"):
        PagedSequences(executor).step({"a": TOKENS})


def test_stages_want_hidden_states_and_only_they() -> None:
    sizes: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "max_model_len": 256}
    second = NativeExecutor(small(), ExecutorOptions(), shard=Shard(first_layer=1), **sizes)
    batch = StepBatch(
        tokens=np.zeros(1, np.int32),
        positions=np.zeros(1, np.int32),
        query_starts=np.array([0, 1], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        logit_rows=np.zeros(1, np.int32),
    )
    with pytest.raises(ValueError, match="all stages but the first"):
        second.step(batch)
    assert second.step(batch, np.zeros((1, 128), np.float32)).shape == (1, 203)


@pytest.mark.parametrize(
    "options",
    [ExecutorOptions(dtype="float32"), ExecutorOptions(rank_invariant=True)],
    ids=["float32", "as stored, rank-invariant"],
)
def test_smollm2_chooses_the_same_tokens_in_ranks(options: ExecutorOptions) -> None:
    """Nine heads, three KV heads: shares of 6 and 3 heads, or of 3, 3, 2 and 1."""
    checkpoint = open_checkpoint("demo")
    weights = CheckpointWeights(checkpoint)
    prompt = load_tokenizer(checkpoint).encode("The capital of France is")
    answers = []
    for size in (1, 2, 4):
        executor = RankedExecutor(
            weights, replace(options, num_threads=1), size, num_blocks=8, max_model_len=256
        )
        sequences = PagedSequences(executor)
        tokens = [int(sequences.step({"a": prompt})["a"][-1].argmax())]
        for _ in range(11):
            tokens.append(int(sequences.step({"a": tokens[-1:]})["a"][-1].argmax()))
        answers.append(tokens)
    assert answers[0] == answers[1] == answers[2]
