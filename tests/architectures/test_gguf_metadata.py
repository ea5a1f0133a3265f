"""GGUF metadata becomes a spec, or one typed error that names the key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.architectures import (
    GGUF_FAMILIES,
    DecoderSpec,
    rope_rotations,
    spec_and_weight_map,
    tensor_shapes,
)
from fuserve.errors import UnsupportedModelError

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 128,
    "embedding_length": 40,
    "block_count": 7,
    "feed_forward_length": 52,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.layer_norm_epsilon": 1e-5,
}


def metadata_of(architecture: str, **changes: Any) -> dict[str, Any]:
    fields = {f"{architecture}.{name}": value for name, value in (SIZES | changes).items()}
    return {"general.architecture": architecture} | fields


def spec_of(metadata: dict[str, Any], *names: str) -> DecoderSpec:
    return spec_and_weight_map("gguf", metadata, names, lambda name: (2.0,) * 5)[0]


@pytest.mark.parametrize("architecture", GGUF_FAMILIES)
def test_every_architecture_maps_every_tensor(architecture: str) -> None:
    spec, sources = spec_and_weight_map("gguf", metadata_of(architecture), ())
    assert spec.family == architecture
    assert set(sources) == set(tensor_shapes(spec))


def test_a_file_without_vocab_size_counts_its_tokens() -> None:
    metadata = metadata_of("llama", vocab_size=None)
    metadata["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    assert spec_of(metadata).vocab_size == 3
    metadata["tokenizer.ggml.tokens"] = []
    with pytest.raises(UnsupportedModelError, match=r"llama\.vocab_size"):
        spec_of(metadata)


def test_the_head_is_tied_where_the_file_has_no_output() -> None:
    assert spec_of(metadata_of("llama")).tied_head
    assert not spec_of(metadata_of("llama"), "output.weight").tied_head


def test_biases_are_where_the_file_has_them() -> None:
    spec = spec_of(metadata_of("llama"), "blk.0.attn_q.bias")
    assert spec.attention.qkv_bias
    assert not spec.attention.output_bias and not spec.feed_forward.bias


def test_rotary_factors_are_read_from_their_tensor() -> None:
    plain, scaled = (
        spec_of(metadata_of("llama"), *names).layers[0].rope
        for names in ((), ("rope_freqs.weight",))
    )
    assert plain is not None and scaled is not None
    slow, _ = rope_rotations(scaled, np.array([8]), 128)
    fast, _ = rope_rotations(plain, np.array([4]), 128)
    np.testing.assert_allclose(slow, fast, rtol=1e-6)
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        spec_and_weight_map("gguf", metadata_of("llama"), ("rope_freqs.weight",))


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_by_its_width_per_head(architecture: str, layers: int) -> None:
    assert spec_of(metadata_of(architecture)).attention.scale == pytest.approx(10**-0.5)
    changes = {"block_count": layers, "attention.key_length": 24}
    assert spec_of(metadata_of(architecture, **changes)).attention.scale == pytest.approx(10**-0.5)
    changes["block_count"] = layers - 1
    assert spec_of(metadata_of(architecture, **changes)).attention.scale == pytest.approx(24**-0.5)


KEYS = (
    *SIZES,
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "expert_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 100)
    | st.integers(0, 2**64 - 1)
    | st.floats()
    | st.sampled_from(["linear", "yarn", "longrope", "none", ""])
    | st.lists(st.integers(0, 9), max_size=3)
)
TENSORS = (
    "output.weight",
    "blk.0.attn_qkv.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    architecture=st.sampled_from(sorted(GGUF_FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4),
    names=st.lists(st.sampled_from(TENSORS), max_size=2),
)
def test_hostile_metadata_gives_a_spec_or_a_typed_error(
    architecture: str, changes: dict[str, Any], names: list[str]
) -> None:
    try:
        spec = spec_of(metadata_of(architecture, **changes), *names)
    except UnsupportedModelError:
        return
    for layer in set(spec.layers):
        if layer.rope is not None:
            angles = rope_rotations(layer.rope, np.arange(3), spec.max_position)
            assert np.isfinite(angles).all()
