"""Folders of quantized layers, as other programs write them, and as they must not be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuserve.checkpoints import open_checkpoint, to_float32
from fuserve.checkpoints.quantized import QuantizedFolder
from fuserve.checkpoints.quantized.bits import AWQ_ORDER, pack_words, unpack_words
from fuserve.checkpoints.safetensors_writer import write_safetensors
from fuserve.errors import CheckpointError, FuserveError, UnsupportedModelError
from fuserve.quantization import QuantizedLinear, QuantScheme

ROWS, COLS = 16, 128
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = MODULE + ".weight"
Parts = dict[str, np.ndarray]


def write(path: Path, config: Mapping[str, Any], parts: Parts) -> Path:
    """A folder whose one quantized layer has ``parts``, beside a plain tensor."""
    arrays = {f"{MODULE}.{name}": array for name, array in parts.items()}
    write_safetensors(
        path / "model.safetensors", arrays | {"model.norm.weight": np.ones(4, np.float32)}
    )
    full = {"model_type": "llama", "quantization_config": dict(config)}
    (path / "config.json").write_text(json.dumps(full))
    return path


def layer_of(path: Path) -> QuantizedLinear:
    quantized = open_checkpoint(path).tensor(WEIGHT).quantized
    assert quantized is not None
    return quantized


def random_codes(bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (ROWS, COLS), np.uint8)


def random_scales(groups: int, seed: int = 1) -> np.ndarray:
    scales = np.random.default_rng(seed).uniform(0.01, 0.1, (ROWS, groups))
    return scales.astype(np.float16).astype(np.float32)


def random_zeros(bits: int, groups: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (ROWS, groups), np.uint8)


def values_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """``scale * (code - zero)``, written out."""
    size = COLS // scales.shape[1]
    wide = [np.repeat(one, size, axis=1).astype(np.float32) for one in (scales, zeros)]
    return wide[0] * (codes.astype(np.float32) - wide[1])


def gptq_parts(bits: int, groups: int, offset: int = 1) -> tuple[Parts, np.ndarray]:
    codes, scales = random_codes(bits), random_scales(groups)
    zeros = random_zeros(bits, groups)
    stored = (zeros - np.uint8(offset)) & np.uint8(2**bits - 1)
    parts = {
        "qweight": np.ascontiguousarray(pack_words(codes, bits).T),
        "qzeros": pack_words(np.ascontiguousarray(stored.T), bits),
        "scales": np.ascontiguousarray(scales.T).astype(np.float16),
        "g_idx": (np.arange(COLS) // (COLS // groups)).astype(np.int32),
    }
    return parts, values_of(codes, scales, zeros)


def gptq_config(bits: int, groups: int, **fields: Any) -> dict[str, Any]:
    size = COLS // groups if groups > 1 else -1
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False} | fields


def compressed_config(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Any:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        | dict(weights),
        "input_activations": inputs,
    }
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def compressed_parts(groups: int) -> tuple[Parts, np.ndarray]:
    codes, scales = random_codes(4), random_scales(groups)
    parts = {
        "weight_packed": pack_words(codes, 4),
        "weight_scale": scales,
        "weight_shape": np.array([ROWS, COLS], np.int64),
    }
    return parts, values_of(codes, scales, np.full_like(scales, 8))


@pytest.mark.parametrize("order", (None, AWQ_ORDER))
def test_words_hold_what_was_packed(order: tuple[int, ...] | None) -> None:
    codes = random_codes(4)[:, :104]
    np.testing.assert_array_equal(unpack_words(pack_words(codes, 4, order), 4, 104, order), codes)
    wide = random_codes(8)
    np.testing.assert_array_equal(unpack_words(pack_words(wide, 8), 8, COLS), wide)


def test_words_have_the_lowest_nibble_first() -> None:
    word = pack_words(np.arange(8, dtype=np.uint8)[None], 4)
    assert hex(int(word[0, 0]) & 0xFFFFFFFF) == "0x76543210"
    awq = pack_words(np.arange(8, dtype=np.uint8)[None], 4, AWQ_ORDER)
    assert hex(int(awq[0, 0]) & 0xFFFFFFFF) == "0x75316420"


@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("bits", (4, 8))
def test_gptq_of_both_versions(bits: int, version: str, groups: int, tmp_path: Path) -> None:
    parts, want = gptq_parts(bits, groups, offset=0 if version == "gptq_v2" else 1)
    write(tmp_path, gptq_config(bits, groups, checkpoint_format=version), parts)
    np.testing.assert_allclose(layer_of(tmp_path).values(), want, atol=1e-4)


def test_gptq_with_groups_out_of_order_is_regridded(tmp_path: Path) -> None:
    parts, _ = gptq_parts(4, 4)
    order = np.random.default_rng(5).permutation(np.arange(COLS) // 32).astype(np.int32)
    parts["g_idx"] = order
    write(tmp_path, gptq_config(4, 4, desc_act=True), parts)
    codes, scales, zeros = random_codes(4), random_scales(4), random_zeros(4, 4)
    want = scales[:, order] * (codes.astype(np.float32) - zeros[:, order])
    layer = layer_of(tmp_path)
    assert layer.scheme == QuantScheme(8, 32) == open_checkpoint(tmp_path).scheme(WEIGHT)
    assert np.abs(layer.values() - want).max() < np.abs(want).max() / 250


def test_symmetric_gptq_needs_no_zero_points(tmp_path: Path) -> None:
    parts, _ = gptq_parts(4, 4)
    parts["qzeros"] = np.full_like(parts["qzeros"], 0x77777777)
    write(tmp_path, gptq_config(4, 4, sym=True), parts)
    layer = layer_of(tmp_path)
    assert layer.scheme == QuantScheme(4, 32)
    want = values_of(random_codes(4), random_scales(4), np.full((ROWS, 4), 8))
    np.testing.assert_array_equal(layer.values(), want)


def test_awq(tmp_path: Path) -> None:
    codes, scales, zeros = random_codes(4), random_scales(2), random_zeros(4, 2)
    parts = {
        "qweight": pack_words(np.ascontiguousarray(codes.T), 4, AWQ_ORDER),
        "qzeros": pack_words(np.ascontiguousarray(zeros.T), 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(scales.T).astype(np.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}
    write(tmp_path, config, parts)
    np.testing.assert_allclose(
        layer_of(tmp_path).values(), values_of(codes, scales, zeros), atol=1e-5
    )


@pytest.mark.parametrize("threshold", (6.0, 0.0))
def test_bitsandbytes_int8(threshold: float, tmp_path: Path) -> None:
    codes = random_codes(8).view(np.int8)
    largest = np.linspace(0.5, 2, ROWS, dtype=np.float32)
    parts = {"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write(tmp_path, config | {"llm_int8_threshold": threshold}, parts)
    layer = layer_of(tmp_path)
    assert layer.scheme.outlier_threshold == (threshold or None)
    np.testing.assert_allclose(layer.values(), codes * largest[:, None] / 127, rtol=1e-6)


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_compressed_tensors_packed(groups: int, tmp_path: Path) -> None:
    parts, want = compressed_parts(groups)
    strategy = {"strategy": "channel"} if groups == 1 else {"group_size": COLS // groups}
    write(tmp_path, compressed_config(strategy), parts)
    np.testing.assert_array_equal(layer_of(tmp_path).values(), want)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape(WEIGHT) == (ROWS, COLS)
    assert checkpoint.num_bytes(WEIGHT) == ROWS * (COLS // 2 + 4 * groups) + 16
    assert set(checkpoint.tensor_names()) == {WEIGHT, "model.norm.weight"}


@pytest.mark.parametrize("is_packed", (True, False))
def test_compressed_tensors_with_zero_points(is_packed: bool, tmp_path: Path) -> None:
    parts, _ = compressed_parts(2)
    zeros = random_zeros(4, 2)
    packed = pack_words(np.ascontiguousarray(zeros.T), 4).T
    signed = (zeros.astype(np.int16) - 8).astype(np.int8)
    parts["weight_zero_point"] = np.ascontiguousarray(packed) if is_packed else signed
    write(tmp_path, compressed_config({"group_size": 64, "symmetric": False}), parts)
    want = values_of(random_codes(4), random_scales(2), zeros)
    np.testing.assert_allclose(layer_of(tmp_path).values(), want, atol=1e-5)


def int8_config(**inputs: Any) -> Any:
    activations = {"num_bits": 8, "type": "int", "symmetric": True} | inputs
    return compressed_config({"num_bits": 8, "strategy": "channel"}, activations)


def int8_parts() -> Parts:
    return {"weight": random_codes(8).view(np.int8), "weight_scale": random_scales(1)}


def test_compressed_tensors_w8a8(tmp_path: Path) -> None:
    write(tmp_path, int8_config(strategy="token", dynamic=True), int8_parts())
    layer = layer_of(tmp_path)
    assert layer.scheme == QuantScheme(8, activations="token")
    want = random_codes(8).view(np.int8) * random_scales(1)
    np.testing.assert_array_equal(layer.values(), want)


def test_static_inputs_with_a_zero_point_are_a_shift(tmp_path: Path) -> None:
    parts = int8_parts() | {
        "input_scale": np.array([0.05], np.float32),
        "input_zero_point": np.array([-20], np.int8),
    }
    config = int8_config(strategy="tensor", dynamic=False, symmetric=False)
    layer = layer_of(write(tmp_path, config, parts))
    x = np.random.default_rng(6).uniform(-5, 7, (9, COLS)).astype(np.float32)
    theirs = 0.05 * (np.clip(np.round(x / 0.05) - 20, -128, 127) + 20)
    assert layer.input_shift is not None and layer.output_shift is not None
    assert layer.input_scale == pytest.approx(0.05)
    ours = 0.05 * np.clip(np.round((x - layer.input_shift) / 0.05), -128, 127)
    np.testing.assert_allclose(
        ours @ layer.values().T + layer.output_shift, theirs @ layer.values().T, atol=2e-2
    )


def test_names_go_before_classes(tmp_path: Path) -> None:
    config = compressed_config({"strategy": "channel", "num_bits": 8})
    named = compressed_config({"group_size": 32})["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = named | {"targets": [r"re:.*\.up_proj$"]}
    parts, want = compressed_parts(4)
    write(tmp_path, config, parts)
    np.testing.assert_array_equal(layer_of(tmp_path).values(), want)


def drop(name: str) -> Any:
    return lambda parts: {key: array for key, array in parts.items() if key != name}


def change(name: str, array: np.ndarray) -> Any:
    return lambda parts: parts | {name: array}


DAMAGES = {
    "no scales": (drop("weight_scale"), "weight_scale.*is missing"),
    "no shape": (drop("weight_shape"), "weight_shape.*is missing"),
    "scales of other groups": (
        change("weight_scale", np.ones((ROWS, 3), np.float32)),
        r"weight_scale.*has shape \[16, 3\].*expected.*\[16, 4\]",
    ),
    "a shape that is another": (
        change("weight_shape", np.array([ROWS, 999], np.int64)),
        "weight_shape is",
    ),
    "codes of another type": (
        change("weight_packed", np.ones((ROWS, COLS // 8), np.float32)),
        "type F32, expected I32",
    ),
    "scales that are not finite": (
        change("weight_scale", np.full((ROWS, 4), np.nan, np.float32)),
        "not finite",
    ),
    "a group that is not there": (
        change("weight_g_idx", np.full(COLS, 7, np.int32)),
        "names groups from 7 to 7, of 4",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_layers_are_refused_naming_the_tensor(damage: str, tmp_path: Path) -> None:
    breaks, message = DAMAGES[damage]
    parts, _ = compressed_parts(4)
    write(tmp_path, compressed_config({"group_size": 32}), breaks(parts))
    with pytest.raises(CheckpointError, match=message) as raised:
        layer_of(tmp_path)
    assert raised.value.tensor is not None and raised.value.tensor.startswith(MODULE)


BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "an unknown method": ({"quant_method": "hqq"}, "quant_method is 'hqq'. Supported"),
    "no method": ({"bits": 4}, "quant_method is None"),
    "a list": ([4], "quant_method is None"),
    "no groups": ({"quant_method": "compressed-tensors"}, "no config_groups"),
    "groups that are a list": (
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        "no config_groups",
    ),
    "floats": (compressed_config({"type": "float"}), "integers of 4 or 8 bits"),
    "three bits": (compressed_config({"num_bits": 3}), "integers of 4 or 8 bits"),
    "blocks": (compressed_config({"strategy": "block"}), "one of the strategies"),
    "no group size": (compressed_config({}), "group_size None"),
    "groups of 20": (compressed_config({"group_size": 20}), "multiple of 32"),
    "int8 inputs of grouped weights": (
        compressed_config(
            {"group_size": 32}, {"num_bits": 8, "strategy": "token", "dynamic": True}
        ),
        "cannot be computed",
    ),
    "static inputs per token": (
        compressed_config({"group_size": 32}, {"num_bits": 8, "strategy": "token"}),
        "dynamic per token, or static per tensor",
    ),
    "a bad pattern": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "g": {
                    "targets": ["re:("],
                    "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
                }
            },
        },
        "no regular expression",
    ),
    "AWQ of another version": ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
    "GPTQ in three bits": ({"quant_method": "gptq", "bits": 3}, "3 bits"),
    "bitsandbytes in four bits": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "4-bit layouts are not supported",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_cannot_be_followed_are_refused(name: str, tmp_path: Path) -> None:
    config, message = BAD_CONFIGS[name]
    parts, _ = compressed_parts(4)
    write(tmp_path, {}, parts)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ("qweight", "qzeros", "scales", "g_idx"))
def test_gptq_parts_that_do_not_fit_are_refused(part: str, tmp_path: Path) -> None:
    parts, _ = gptq_parts(4, 4)
    parts[part] = parts[part][:-1]
    write(tmp_path, gptq_config(4, 4), parts)
    with pytest.raises(FuserveError, match=MODULE):
        layer_of(tmp_path)


def test_a_plain_folder_is_not_taken_for_a_quantized_one(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones((2, 3), np.float32)})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert not isinstance(checkpoint, QuantizedFolder)
    assert checkpoint.scheme("a") is None
    np.testing.assert_array_equal(to_float32(checkpoint.tensor("a")), np.ones((2, 3)))
