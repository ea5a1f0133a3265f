"""Rotary frequencies of every scaling equal those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from fuserve.architectures import (
    RopeScaling,
    RopeSpec,
    alibi_slopes,
    rope_frequencies,
    rope_rotations,
    spec_from_config,
)
from tests.architectures.published_configs import LLAMA3, PUBLISHED, SMOLLM2_135M

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.5},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn with its factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 2048,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + i / 9 for i in range(32)],
        "long_factor": [1.5 + i for i in range(32)],
        "original_max_position_embeddings": 2048,
    },
}


def rope_of(scaling: dict[str, Any]) -> RopeSpec:
    rope = spec_from_config(SMOLLM2_135M | {"rope_scaling": scaling}).layers[0].rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, 8192])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    scaling = SCALINGS[name]
    config = LlamaConfig(
        **{k: v for k, v in SMOLLM2_135M.items() if not k.startswith("rope")},
        rope_parameters={**scaling, "rope_theta": 100_000.0},
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
    table = rope_frequencies(rope_of(scaling), max_position=length)
    np.testing.assert_allclose(table.inv_freq, inv_freq.numpy(), rtol=3e-7)
    assert table.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_longrope_takes_the_long_factors_only_beyond_the_original_length() -> None:
    rope = rope_of(SCALINGS["longrope"])
    at_limit = rope_frequencies(rope, 2048).inv_freq
    assert np.array_equal(at_limit, rope_frequencies(rope, 10).inv_freq)
    assert not np.allclose(at_limit, rope_frequencies(rope, 2049).inv_freq)


def test_dynamic_ntk_leaves_short_positions_alone_and_stretches_each_later_one() -> None:
    plain = RopeSpec(dim=8, base=100.0)
    rope = RopeSpec(dim=8, base=100.0, scaling=RopeScaling("dynamic", 2.0, 64))
    positions = np.arange(100)
    angles = rope_rotations(rope, positions, 128)
    expected = rope_rotations(plain, positions, 128)
    for part, expected_part in zip(angles, expected, strict=True):
        np.testing.assert_array_equal(part[:64], expected_part[:64])
    base = 100.0 * (2.0 * 100 / 64 - 1) ** (8 / 6)  # of position 99, a sequence of 100 tokens
    last = np.cos(99 / base ** (np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(angles[0][99], last, atol=1e-5)


@pytest.mark.parametrize("name", [*SCALINGS, "dynamic"])
def test_a_position_turns_the_same_however_a_prompt_is_cut(name: str) -> None:
    rope = rope_of(SCALINGS.get(name, {"rope_type": "dynamic", "factor": 2.0}))
    positions = np.arange(8180, 8200)
    whole = rope_rotations(rope, positions, 16_384)
    for cut in (1, 7, 19):
        parts = [rope_rotations(rope, part, 16_384) for part in np.split(positions, [cut])]
        for index in range(2):
            joined = np.concatenate([part[index] for part in parts])
            np.testing.assert_array_equal(joined, whole[index])


def test_rotations_carry_the_attention_factor() -> None:
    cos, sin = rope_rotations(rope_of(SCALINGS["yarn with its factor"]), np.arange(50), 8192)
    np.testing.assert_allclose(np.hypot(cos, sin), 1.25, rtol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 25, 112])
def test_alibi_slopes_are_those_of_transformers(num_heads: int) -> None:
    expected = _get_alibi_slopes(num_heads, device=None).numpy()
    np.testing.assert_allclose(alibi_slopes(num_heads), expected, rtol=2e-6)


def test_a_published_partial_rotation_turns_three_quarters_of_each_head() -> None:
    rope = spec_from_config(PUBLISHED["Phi-4-mini"][0]).layers[0].rope
    assert rope is not None and rope.dim == 96
