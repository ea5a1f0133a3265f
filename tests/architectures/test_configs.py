"""A config.json becomes a spec, or one typed error that names the field."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.architectures import (
    CONFIG_FAMILIES,
    DecoderSpec,
    rope_rotations,
    spec_and_weight_map,
    spec_from_config,
    tensor_shapes,
)
from fuserve.errors import UnsupportedModelError
from tests.architectures.published_configs import PUBLISHED, SMOLLM2_135M


def num_parameters(spec: DecoderSpec) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert num_parameters(spec_from_config(config)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_means_the_same_after_transformers_has_rewritten_it(name: str) -> None:
    """transformers 5 moves rotary fields and writes layer types; both forms are in the wild."""
    config, _ = PUBLISHED[name]
    rewritten = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    old, new = spec_from_config(config), spec_from_config(rewritten)
    if config["model_type"] == "bloom":  # the rewritten form has no length
        new = replace(new, max_position=old.max_position)
    assert new == old


def test_the_published_models_cover_every_family() -> None:
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == set(CONFIG_FAMILIES)


def test_qwens_windows_begin_at_max_window_layers() -> None:
    config, _ = PUBLISHED["Qwen2.5-0.5B"]
    windowed = config | {
        "use_sliding_window": True,
        "sliding_window": 50,
        "max_window_layers": 21,
        "num_hidden_layers": 24,
    }
    windows = [layer.sliding_window for layer in spec_from_config(windowed).layers]
    assert windows == [None] * 21 + [50] * 3


def test_gemma3_has_a_global_layer_with_its_own_base_after_five_local_ones() -> None:
    spec = spec_from_config(PUBLISHED["gemma-3-4b"][0])
    local, global_ = spec.layers[4], spec.layers[5]
    assert local.sliding_window == 1024 and global_.sliding_window is None
    assert local.rope is not None and global_.rope is not None
    assert (local.rope.base, local.rope.scaling) == (10_000.0, None)
    assert global_.rope.base == 1_000_000.0
    assert global_.rope.scaling is not None and global_.rope.scaling.factor == 8.0
    assert spec.max_position == 131_072


def test_stretched_models_read_as_far_as_they_are_stretched() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = PUBLISHED["Qwen2.5-0.5B"][0] | {"rope_scaling": yarn}
    assert spec_from_config(qwen).max_position == 131_072
    dynamic = SMOLLM2_135M | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert spec_from_config(dynamic).max_position == 16_384
    assert spec_from_config(PUBLISHED["Llama-3.2-1B"][0]).max_position == 131_072


REFUSED = {
    "unknown architecture": ("SmolLM2-135M", {"model_type": "mamba"}, "model_type"),
    "no architecture": ("SmolLM2-135M", {"model_type": None}, "model_type"),
    "an unhashable architecture": ("SmolLM2-135M", {"model_type": ["llama"]}, "model_type"),
    "no size": ("SmolLM2-135M", {"hidden_size": None}, "hidden_size"),
    "text for a size": ("SmolLM2-135M", {"hidden_size": "576"}, "hidden_size"),
    "true for a size": ("SmolLM2-135M", {"num_hidden_layers": True}, "num_hidden_layers"),
    "negative layers": ("SmolLM2-135M", {"num_hidden_layers": -1}, "num_hidden_layers"),
    "absurd layers": ("SmolLM2-135M", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "absurd vocabulary": ("SmolLM2-135M", {"vocab_size": 10**30}, "vocab_size"),
    "heads that do not divide": ("SmolLM2-135M", {"num_attention_heads": 7}, "head_dim"),
    "no heads": ("SmolLM2-135M", {"num_attention_heads": 0}, "num_attention_heads"),
    "more heads than features": ("SmolLM2-135M", {"num_attention_heads": 1152}, "head_dim"),
    "KV heads that do not divide": (
        "SmolLM2-135M",
        {"num_key_value_heads": 2},
        "num_key_value_heads",
    ),
    "an odd head": ("SmolLM2-135M", {"head_dim": 63}, "head_dim"),
    "activation": ("SmolLM2-135M", {"hidden_act": "xielu"}, "hidden_act"),
    "NaN": ("SmolLM2-135M", {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    "a huge number": ("SmolLM2-135M", {"rope_theta": 10**400}, "rope_theta"),
    "base one": ("SmolLM2-135M", {"rope_theta": 1}, "rope_theta"),
    "partial rotation": (
        "SmolLM2-135M",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    "rope kind": (
        "SmolLM2-135M",
        {"rope_scaling": {"rope_type": "mrope"}},
        "rope_scaling.rope_type",
    ),
    "rope no mapping": ("SmolLM2-135M", {"rope_scaling": [1]}, "rope_scaling"),
    "no factor": ("SmolLM2-135M", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    "llama3 bounds": (
        "SmolLM2-135M",
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
        "rope_scaling.high_freq_factor",
    ),
    "too few rope factors": (
        "Phi-4-mini",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_scaling.short_factor",
    ),
    "yarn on Phi-3": (
        "Phi-3-mini-4k",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        "rope_scaling",
    ),
    "layer types": ("Qwen3-0.6B", {"layer_types": ["full_attention"]}, "layer_types"),
    "nested types": ("Qwen3-0.6B", {"layer_types": [[]] * 28}, "layer_types"),
    "window types without window": (
        "Qwen3-0.6B",
        {"layer_types": ["sliding_attention"] * 28},
        "sliding_window",
    ),
    "both directions": (
        "gemma-3-1b",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "text config": ("gemma-3-4b", {"text_config": 3}, "text_config"),
    "inside text config": (
        "gemma-3-4b",
        {"text_config": {"hidden_size": 0}},
        "text_config.hidden_size",
    ),
    "scale per layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
    ),
    "GPT-2's heads": ("gpt2", {"n_head": 5}, "n_head"),
    "OPT-350m": ("opt-125m", {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
    "plain norms": (
        "opt-125m",
        {"layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine",
    ),
    "BLOOM's residual": (
        "bloom-560m",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_naming_the_field(case: str) -> None:
    name, changes, field = REFUSED[case]
    with pytest.raises(UnsupportedModelError) as refusal:
        spec_from_config(PUBLISHED[name][0] | changes)
    assert f"'{field}'" in str(refusal.value)
    assert "Needed: " in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_an_unknown_architecture_is_told_which_ones_there_are() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*'llama', 'mistral', 'qwen2'"):
        spec_from_config({"model_type": "mamba"})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 9)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope", "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["type", "rope_type", "factor", "rope_theta", "short_factor", "full_attention"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_hostile_config_gives_a_spec_or_a_typed_error(data: st.DataObject) -> None:
    config: dict[str, Any] = copy.deepcopy(
        PUBLISHED[data.draw(st.sampled_from(list(PUBLISHED)))][0]
    )
    names = [*config, "rope_parameters", "rope_scaling", "layer_types", "text_config", "head_dim"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = data.draw(JSON)
    try:
        spec, sources = spec_and_weight_map("huggingface", config, ())
    except UnsupportedModelError:
        return
    assert set(sources) == set(tensor_shapes(spec))
    for layer in set(spec.layers):
        if layer.rope is not None:
            angles = rope_rotations(layer.rope, np.arange(3), spec.max_position)
            assert np.isfinite(angles).all()
