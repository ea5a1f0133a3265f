"""Folders that fuserve writes, loaded by transformers with the public compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from fuserve.calibration import CalibrationOptions, quantize_model
from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import CheckpointWeights
from fuserve.quantization import LayerChoice, recipe_named
from tests.calibration.small_models import sized_model, write_text
from tests.parity.paging import NUM_BLOCKS, PagedSequences, build_executor

pytest.importorskip("compressed_tensors")

OPTIONS = CalibrationOptions(num_samples=8, sample_tokens=32)
TOKENS = np.random.default_rng(0).integers(3, 90, 40).tolist()

WEIGHT_ONLY = ("int8", "int4", "gptq", "awq", "gptq-int8")
Quantize = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quantize(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    source = tmp_path_factory.mktemp("llama")
    sized_model("llama", source)
    text = write_text(tmp_path_factory.mktemp("text"))

    def run(
        scheme: str,
        *layers: str,
        group_size: int | None = None,
        symmetric: bool | None = None,
        name: str = "llama",
    ) -> Path:
        folder = source
        if name != "llama":
            folder = tmp_path_factory.mktemp(name)
            sized_model(name, folder)
        choice = LayerChoice.parse(recipe_named(scheme, group_size, symmetric), layers)
        output = tmp_path_factory.mktemp("output")
        quantize_model(open_checkpoint(folder), output, choice, OPTIONS, text=text)
        return output

    return run


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def transformers_logits(folder: Path, dequantize: bool = False) -> np.ndarray:
    # compressed-tensors 0.20 makes no room for packed zero points unless it dequantizes on load.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = load(folder, **how)
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


def our_logits(folder: Path) -> np.ndarray:
    weights = CheckpointWeights(open_checkpoint(folder))
    sequences = PagedSequences(build_executor("reference", weights, 128))
    return sequences.step({"only": TOKENS})["only"]


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_transformers_loads_weight_only_schemes_to_the_same_logits(
    scheme: str, symmetric: bool, quantize: Quantize
) -> None:
    folder = quantize(scheme, group_size=32, symmetric=symmetric)
    assert error(our_logits(folder), transformers_logits(folder, dequantize=not symmetric)) < 1e-4


@pytest.mark.parametrize(("scheme", "symmetric"), (("int4", True), ("int4", False), ("gptq", True)))
def test_transformers_loads_one_scale_per_channel_to_the_same_logits(
    scheme: str, symmetric: bool, quantize: Quantize
) -> None:
    folder = quantize(scheme, group_size=0, symmetric=symmetric)
    assert error(our_logits(folder), transformers_logits(folder, dequantize=not symmetric)) < 1e-4


def test_transformers_loads_mixed_schemes_to_the_same_logits(quantize: Quantize) -> None:
    folder = quantize(
        "gptq",
        "layers.1.down=int8:32",
        "layers.0.q=keep",
        "lm_head=int8:32",
        group_size=32,
        symmetric=True,
    )
    assert error(our_logits(folder), transformers_logits(folder)) < 1e-4


@pytest.mark.parametrize("name", ("phi3", "qwen2", "gemma2", "opt", "bloom"))
def test_transformers_loads_other_families_to_the_same_logits(
    name: str, quantize: Quantize
) -> None:
    folder = quantize("int8", group_size=32, name=name)
    assert error(our_logits(folder), transformers_logits(folder)) < 1e-4


@pytest.mark.parametrize("scheme", ("w8a8", "smoothquant", "w8a8-static", "smoothquant-static"))
def test_transformers_loads_int8_activations_to_the_same_weights(
    scheme: str, quantize: Quantize
) -> None:
    """Both sides round activations: to steps of a 127th, and there of half a 255th.

    How far that carries depends on the weights that calibration ends at, and so on the machine's
    BLAS: less than 0.05 of the spread on some, 0.053 on a Zen 3, in either instruction set.
    """
    folder = quantize(scheme)
    model = load(folder)
    with torch.inference_mode():
        theirs = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    weights = CheckpointWeights(open_checkpoint(folder))
    down = weights.tensor("layers.1.down").quantized
    assert down is not None
    loaded = model.model.layers[1].mlp.down_proj
    np.testing.assert_allclose(loaded.weight.float().numpy(), down.values(), rtol=1e-6)
    if down.input_scale is not None:
        assert float(loaded.input_scale) == pytest.approx(down.input_scale)
    options = ExecutorOptions(kv_cache_dtype="float32")
    executor = NativeExecutor(weights, options, num_blocks=NUM_BLOCKS, max_model_len=128)
    ours = PagedSequences(executor).step({"only": TOKENS})["only"]
    assert np.abs(ours - theirs).mean() < 0.06 * theirs.std()
