"""Weights reach the executors whole, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fuserve.architectures import spec_and_weight_map, tensor_shapes
from fuserve.decoder.weights import CheckpointWeights, DummyWeights, spec_from_config
from fuserve.errors import CheckpointError, UnsupportedModelError
from tests.decoder.fake_checkpoint import FakeCheckpoint

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
}
GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 4, "tie_word_embeddings": True}
PHI3 = LLAMA | {"model_type": "phi3"}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 16,
    "vocab_size": 11,
}
BLOOM = {"model_type": "bloom", "hidden_size": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11}

STACKED = {"qkv_proj": 16, "gate_up_proj": 24}


def fake(config: dict[str, object]) -> FakeCheckpoint:
    """A checkpoint with exactly the tensors the config asks for, every value different."""
    spec, sources = spec_and_weight_map("huggingface", config, ())
    arrays: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(spec).items():
        source = sources[name]
        if source.rows is not None or source.per_head is not None:
            is_gpt2 = spec.family == "gpt2"
            rows = 24 if is_gpt2 or spec.family == "bloom" else 0
            rows = rows or next(n for part, n in STACKED.items() if part in source.name)
            shape = (rows, *shape[1:])
        if source.transpose:
            shape = shape[::-1]
        start = 1000.0 * len(arrays)
        values = start + np.arange(math.prod(shape), dtype=np.float32)
        arrays.setdefault(source.name, values.reshape(shape))
    return FakeCheckpoint(config, arrays)


def test_a_plain_tensor_is_a_view_of_the_checkpoint() -> None:
    checkpoint = fake(LLAMA)
    tensor = CheckpointWeights(checkpoint).tensor("layers.1.k")
    assert tensor.shape == (4, 8)
    stored = checkpoint.arrays["model.layers.1.self_attn.k_proj.weight"]
    assert np.shares_memory(tensor.data, stored)


def test_stacked_rows_are_cut_without_a_copy() -> None:
    checkpoint = fake(PHI3)
    weights = CheckpointWeights(checkpoint)
    stored = checkpoint.arrays["model.layers.0.self_attn.qkv_proj.weight"]
    parts = [weights.tensor(f"layers.0.{name}") for name in "qkv"]
    assert [part.shape for part in parts] == [(8, 8), (4, 8), (4, 8)]
    assert all(np.shares_memory(part.data, stored) for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.data for part in parts]), stored)


def test_transposed_and_interleaved_weights_come_out_straight() -> None:
    gpt2 = fake(GPT2)
    stored = gpt2.arrays["transformer.h.0.attn.c_attn.weight"]  # [in, out]
    value = CheckpointWeights(gpt2).tensor("layers.0.v")
    np.testing.assert_array_equal(value.data, stored[:, 16:].T)
    assert value.data.flags.c_contiguous

    bloom = fake(BLOOM)
    stored = bloom.arrays["transformer.h.0.self_attention.query_key_value.weight"]
    key = CheckpointWeights(bloom).tensor("layers.0.k")
    np.testing.assert_array_equal(key.data, np.concatenate([stored[4:8], stored[16:20]]))


def test_gemmas_norms_get_their_one_and_nothing_else_does() -> None:
    checkpoint = fake(GEMMA)
    weights = CheckpointWeights(checkpoint)
    stored = checkpoint.arrays["model.layers.0.post_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(weights.tensor("layers.0.post_ffn_norm").data, stored + 1)
    embedding = checkpoint.arrays["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights.tensor("embedding").data, embedding)


def test_bfloat16_norms_are_shifted_in_float32() -> None:
    checkpoint = fake(GEMMA)
    name = "model.layers.0.input_layernorm.weight"
    checkpoint.arrays[name] = np.full(8, 0x3C00, np.uint16)  # 2 ** -7 in bfloat16
    tensor = CheckpointWeights(checkpoint).tensor("layers.0.attn_norm")
    assert tensor.dtype == "F32"
    assert CheckpointWeights(checkpoint).dtype("layers.0.attn_norm") == "F32"
    np.testing.assert_array_equal(tensor.data, np.full(8, 1 + 2**-7, np.float32))


def test_a_checkpoint_saved_without_its_outer_module_is_found() -> None:
    checkpoint = fake(GPT2)
    checkpoint.arrays = {
        name.removeprefix("transformer."): array for name, array in checkpoint.arrays.items()
    }
    assert CheckpointWeights(checkpoint).tensor("final_norm").shape == (8,)


def test_a_tied_head_has_no_tensor_and_releasing_reaches_the_file() -> None:
    checkpoint = fake(GEMMA)
    weights = CheckpointWeights(checkpoint)
    assert "head" not in weights and "embedding" in weights
    weights.release("embedding")
    assert checkpoint.released == ["model.embed_tokens.weight"]


Damage = Callable[[dict[str, np.ndarray]], object]
DAMAGES: dict[str, tuple[dict[str, object], str, Damage]] = {
    "missing": (
        LLAMA,
        "model.layers.1.mlp.down_proj.weight",
        lambda arrays: arrays.pop("model.layers.1.mlp.down_proj.weight"),
    ),
    "missing head": (LLAMA, "lm_head.weight", lambda arrays: arrays.pop("lm_head.weight")),
    "too narrow": (
        LLAMA,
        "model.layers.0.self_attn.q_proj.weight",
        lambda arrays: arrays.update(
            {"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 7), np.float32)}
        ),
    ),
    "stack too short": (
        PHI3,
        "model.layers.0.self_attn.qkv_proj.weight",
        lambda arrays: arrays.update(
            {"model.layers.0.self_attn.qkv_proj.weight": np.zeros((15, 8), np.float32)}
        ),
    ),
    "stack too long": (
        PHI3,
        "model.layers.1.mlp.gate_up_proj.weight",
        lambda arrays: arrays.update(
            {"model.layers.1.mlp.gate_up_proj.weight": np.zeros((25, 8), np.float32)}
        ),
    ),
    "not transposed": (
        GPT2,
        "transformer.h.0.attn.c_attn.weight",
        lambda arrays: arrays.update(
            {"transformer.h.0.attn.c_attn.weight": np.zeros((24, 8), np.float32)}
        ),
    ),
    "a scalar": (
        BLOOM,
        "transformer.h.0.self_attention.query_key_value.weight",
        lambda arrays: arrays.update(
            {"transformer.h.0.self_attention.query_key_value.weight": np.zeros((), np.float32)}
        ),
    ),
    "integers": (
        GPT2,
        "transformer.h.0.mlp.c_fc.weight",
        lambda arrays: arrays.update(
            {"transformer.h.0.mlp.c_fc.weight": np.zeros((8, 32), np.int8)}
        ),
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_an_incomplete_checkpoint_is_refused_up_front_naming_the_tensor(case: str) -> None:
    config, tensor, damage = DAMAGES[case]
    checkpoint = fake(config)
    damage(checkpoint.arrays)
    with pytest.raises(CheckpointError) as refusal:
        CheckpointWeights(checkpoint)
    assert refusal.value.tensor == tensor
    assert "/models/fake" in str(refusal.value)
    assert "expected" in str(refusal.value) and refusal.value.remedy


def test_rotary_factors_of_the_wrong_shape_are_refused() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": 11,
        "llama.embedding_length": 8,
        "llama.context_length": 64,
        "llama.block_count": 1,
        "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    square = {"rope_freqs.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        CheckpointWeights(FakeCheckpoint(metadata, square, "gguf"))
    short = {"rope_freqs.weight": np.ones(1, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        CheckpointWeights(FakeCheckpoint(metadata, short, "gguf"))
    with pytest.raises(UnsupportedModelError, match=r"llama\.embedding_length"):
        CheckpointWeights(FakeCheckpoint(metadata | {"llama.embedding_length": -8}, {}, "gguf"))
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture.*'rwkv'"):
        CheckpointWeights(FakeCheckpoint({"general.architecture": "rwkv"}, {}, "gguf"))
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_count"):
        CheckpointWeights(FakeCheckpoint(metadata | {"llama.expert_count": 8}, {}, "gguf"))


def test_dummy_weights_repeat_and_look_like_weights() -> None:
    spec = spec_from_config(LLAMA | {"vocab_size": 500, "hidden_size": 64})
    weights, again, other = DummyWeights(spec), DummyWeights(spec), DummyWeights(spec, seed=1)
    for name, shape in tensor_shapes(spec).items():
        tensor = weights.tensor(name)
        assert tensor.dtype == weights.dtype(name)
        assert name in weights and tensor.shape == tensor.data.shape == shape
        np.testing.assert_array_equal(tensor.data, again.tensor(name).data)
        assert not np.array_equal(tensor.data, other.tensor(name).data)
        weights.release(name)
    embedding = weights.tensor("embedding")
    assert embedding.dtype == "F16"
    assert np.std(embedding.data.astype(np.float32)) == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(embedding.data, axis=0)) == 500
    norm = weights.tensor("layers.0.attn_norm")
    assert norm.dtype == "F32" and np.mean(norm.data) == pytest.approx(1.0, abs=0.02)
    first, second = weights.tensor("layers.0.q"), weights.tensor("layers.1.q")
    assert not np.array_equal(first.data, second.data)
