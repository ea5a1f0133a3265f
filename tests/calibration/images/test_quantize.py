"""A quantized diffusion model: what is written, how it is read, and what it predicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fuserve import ImageParams, TextToImage
from fuserve.calibration.images import (
    IMAGE_RECIPES,
    ImageCalibrationOptions,
    ImageQuantizationReport,
    quantize_image_model,
)
from fuserve.diffusion.diffusers_folder import read_diffusers_folder
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.program import Array, Conv, Linear
from fuserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from fuserve.quantization import LayerChoice, recipe_named
from tests.diffusion.model_folders import small_sd
from tests.diffusion.oracles import nhwc

OPTIONS = ImageCalibrationOptions(num_prompts=1, steps=2, guidance_scale=3.0, alpha=0.5)
NATIVE = DiffusionOptions(num_threads=1)
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    small_sd(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def folders(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in each scheme."""
    parent = tmp_path_factory.mktemp("quantized")
    for scheme in IMAGE_RECIPES:
        quantized(original, parent / scheme, scheme)
    return {scheme: parent / scheme for scheme in IMAGE_RECIPES}


def quantized(
    source: Path, output: Path, scheme: str, group_size: int | None = None, **changes: Any
) -> ImageQuantizationReport:
    choice = LayerChoice(recipe_named(scheme, group_size, recipes=IMAGE_RECIPES), ())
    return quantize_image_model(source, output, choice, OPTIONS, **changes)


def prediction(model: DiffusionModel) -> Array:
    """Of a guided pair, side by side."""
    latents = nhwc(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11)))
    positive, negative = model.encode_prompts(["a red circle"]), model.encode_prompts([""])
    times = np.array([401.0], np.float32)
    below, above = model.denoiser(positive, negative, times, 32, 32).predict(latents, 0)
    assert below is not None
    return np.stack([below, above])


def simulated(folder: Path) -> DiffusionModel:
    """The quantized model by the formula of ``QuantizedWeight``, over the float kernels."""
    parts = read_diffusers_folder(folder)
    weights = parts.unet.weights

    def rounded(op: Conv | Linear, x: Array) -> Array:
        quantized = weights.quantized(op.weight[0])
        if quantized is None:
            return x
        multiplier = 1.0 if quantized.multiplier is None else quantized.multiplier
        steps = x * multiplier
        if quantized.input_scale is not None:
            scale: Any = quantized.input_scale
        else:
            parts = steps.shape[-1] // 32 if quantized.bits == 4 else 1
            split = np.abs(steps).reshape(*steps.shape[:-1], parts, -1)
            scale = np.repeat(split.max(axis=-1) / 127, split.shape[-1], axis=-1)
        return (np.clip(np.rint(steps / scale), -127, 127) * scale / multiplier).astype(np.float32)

    return DiffusionModel(parts, NATIVE, rounded)


def distance(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("scheme", "tolerance"), [("w8a8", 0.09), ("w4a8", 0.22)])
def test_it_predicts_nearly_as_the_original(
    original: Path, folders: dict[str, Path], scheme: str, tolerance: float
) -> None:
    exact = prediction(DiffusionModel.load(original, NATIVE))
    by_formula = prediction(simulated(folders[scheme]))
    assert 0.001 < distance(by_formula, exact) < tolerance
    loaded = prediction(DiffusionModel.load(folders[scheme], NATIVE))
    assert 0.001 < distance(loaded, exact) < tolerance


def test_static_scales_are_used_for_all_tokens(folders: dict[str, Path]) -> None:
    weights = read_diffusers_folder(folders["w8a8-static"]).unet.weights
    for name in (f"{LAYER}.attn1.to_q.weight", f"{LAYER}.ff.net.2.weight"):
        one = weights.quantized(name)
        assert one is not None and one.input_scale is not None and one.input_scale > 0


def test_tensors_are_what_their_config_says(original: Path, folders: dict[str, Path]) -> None:
    before = load_file(original / WEIGHTS)
    for scheme, folder in folders.items():
        weights = read_diffusers_folder(folder).unet.weights
        conv = weights.quantized("mid_block.resnets.0.conv1.weight")
        assert conv is not None and conv.input_scale is not None
        assert (conv.bits, conv.values.shape) == (8, (64, 64, 3, 3))
        linear = weights.quantized(f"{LAYER}.ff.net.0.proj.weight")
        assert linear is not None
        assert linear.bits == (4 if scheme == "w4a8" else 8)
        assert np.abs(linear.values).max() == (7 if scheme == "w4a8" else 127)
        for name, one in (
            ("mid_block.resnets.0.conv1.weight", conv),
            (f"{LAYER}.ff.net.0.proj.weight", linear),
        ):
            assert one.values.dtype == np.int8
            off = one.float32() - before[name]
            assert np.abs(off).max() < (0.3 if one.bits == 4 else 0.02) * np.abs(before[name]).max()
        wide = weights.quantized("mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight")
        assert wide is not None
        assert (wide.group_size, wide.scales.shape) == (
            (64, (64, 4)) if scheme == "w4a8" else (0, (64, 1))
        )
        assert weights.quantized("conv_in.weight") is None
        np.testing.assert_array_equal(weights.float32("conv_in.weight"), before["conv_in.weight"])


def test_four_bits_may_have_a_scale_for_each_output(original: Path, tmp_path: Path) -> None:
    quantized(original, tmp_path / "out", "w4a8", group_size=0)
    one = read_diffusers_folder(tmp_path / "out").unet.weights.quantized(f"{LAYER}.ff.net.2.weight")
    assert one is not None
    assert (one.bits, one.group_size, one.scales.shape) == (4, 0, (len(one.values), 1))
    exact = prediction(DiffusionModel.load(original, NATIVE))
    by_formula = prediction(simulated(tmp_path / "out"))
    loaded = prediction(DiffusionModel.load(tmp_path / "out", NATIVE))
    assert distance(by_formula, exact) < 0.3
    assert distance(loaded, by_formula) < 0.05  # values beside ties are rounded to either side


def test_the_folder_is_smaller_complete_and_repeatable(original: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    report = quantized(
        original,
        tmp_path / "one",
        "w8a8",
        half=True,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    quantized(original, tmp_path / "two", "w8a8", half=True)
    names = {str(file.relative_to(original)) for file in original.rglob("*") if file.is_file()}
    for name in names:
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "two" / name).read_bytes()
    assert report.unet_bytes[1] < 0.45 * report.unet_bytes[0]
    assert report.num_bytes[1] < report.num_bytes[0] - 0.5 * report.unet_bytes[0]
    assert report.num_evaluations == 2
    assert {stage for stage, _, _ in stages} == {"observing inputs", "quantizing layers"}
    assert all(0 <= done <= total for _, done, total in stages)
    config = json.loads((tmp_path / "one/unet/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fuserve"
    assert "mid_block.resnets.0.conv1" in config["config_groups"]["group_0"]["targets"]
    vae = load_file(tmp_path / "one/vae/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in vae.values()} == {np.dtype(np.float16)}


def test_sizes_are_of_what_is_read(original: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(original, model)
    for name in ("whole.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        shutil.copyfile(original / WEIGHTS, model / name)
    report = quantized(model, tmp_path / "out", "w8a8")
    parts = ("unet", "vae", "text_encoder")
    for folder, index in ((original, 0), (tmp_path / "out", 1)):
        sizes = {
            part: sum(tensor.nbytes for tensor in load_file(file).values())
            for part in parts
            for file in (folder / part).glob("*.safetensors")
        }
        assert report.unet_bytes[index] == sizes["unet"]
        assert report.num_bytes[index] == sum(sizes.values())


@pytest.mark.parametrize("name", ["unet/", "../elsewhere", "vae/../../elsewhere", "/tmp", "..", ""])
def test_parts_outside_the_folder_are_refused(original: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(original, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "X"]}))
    with pytest.raises(
        CheckpointError, match=r"model_index\.json: names the part '.*', which is not"
    ):
        quantized(model, tmp_path / "out", "w8a8")
    assert not (tmp_path / "out").exists()


def test_it_paints_nearly_the_same_picture(original: Path, folders: dict[str, Path]) -> None:
    params = ImageParams(steps=3, seed=5, width=32, height=32, guidance_scale=2.0)
    pictures = []
    for folder in (original, folders["w8a8"]):
        with TextToImage(folder, num_threads=1) as painter:
            pictures.append(painter.generate("a red circle", params)[0].pixels.astype(np.float64))
    error = np.mean(np.square(pictures[0] - pictures[1]))
    assert 0 < error < 255**2 * 10 ** (-2.5)  # a PSNR of 25 dB


def test_a_lora_changes_a_quantized_model_as_the_original(
    original: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = load_file(original / WEIGHTS)
    rng = np.random.default_rng(4)
    tensors = {}
    for path in (
        f"{LAYER}.attn1.to_q",
        f"{LAYER}.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",
        "up_blocks.2.resnets.1.conv1",
        "mid_block.resnets.0.conv2",
    ):
        out, *inwards = before[f"{path}.weight"].shape
        down = rng.standard_normal((4, *inwards), np.float32) / 4
        up = rng.standard_normal((out, 4, *(1 for _ in inwards[1:])), np.float32) / out**0.5
        tensors |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = [LoraOption(tmp_path / "lora.safetensors")]
    changes = []
    for folder in (original, folders["w8a8"], folders["w4a8"]):
        model = DiffusionModel.load(folder, NATIVE)
        plain = prediction(model)
        model.set_loras(lora)
        changed = prediction(model)
        changes.append(changed - plain)
        assert distance(changed, plain) > 0.1
        model.set_loras([])
        np.testing.assert_array_equal(prediction(model), plain)
    # Each prediction has its own rounding; without the LoRA the distance would be 1.
    assert distance(changes[1], changes[0]) < 0.35
    assert distance(changes[2], changes[0]) < 0.7


Damage = Callable[[dict[str, Any], dict[str, Any]], None]


def _no_scales(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    del tensors["mid_block.resnets.0.conv1.weight_scale"]


def _short_smoothing(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    name = f"{LAYER}.ff.net.2.input_smoothing"
    tensors[name] = tensors[name][1:].copy()


def _zero_smoothing(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["mid_block.resnets.0.conv1.input_smoothing"][3] = 0


def _other_inputs(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.attn1.to_k.input_smoothing"][0] *= 2


def _one_in_float(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for end in ("weight_scale", "input_smoothing"):
        del tensors[f"{LAYER}.attn1.to_k.{end}"]
    name = f"{LAYER}.attn1.to_k.weight"
    tensors[name] = tensors[name].astype(np.float32)


def _other_method(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["quant_method"] = "quanto"


def _no_groups(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["config_groups"] = {}


def _convs_per_token(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for group in config["config_groups"].values():
        group["input_activations"] |= {"strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_no_scales, CheckpointError, r"mid_block.resnets.0.conv1.weight"),
        (_short_smoothing, CheckpointError, r"input_smoothing.*expected"),
        (_zero_smoothing, CheckpointError, "not above 0"),
        (_other_inputs, CheckpointError, "attn1.to_k.*another multiplier"),
        (_one_in_float, CheckpointError, "attn1.to_k.*not quantized as"),
        (_other_method, UnsupportedModelError, "quant_method is 'quanto'"),
        (_no_groups, CheckpointError, "config_groups"),
        (_convs_per_token, UnsupportedModelError, "for convolutions int8 with inputs of one fixed"),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    damage: Damage,
    error: type[Exception],
    message: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["w8a8"], folder)
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "unet/config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, folder / WEIGHTS)
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        prediction(DiffusionModel.load(folder, NATIVE))


def test_what_cannot_be_quantized_is_refused(
    original: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        quantized(folders["w8a8"], tmp_path / "out", "w8a8")
    with pytest.raises(InvalidRequestError, match="not an empty folder"):
        quantized(original, folders["w8a8"], "w8a8")
    with pytest.raises(InvalidRequestError, match="is a single file"):
        quantized(original / WEIGHTS, tmp_path / "out", "w8a8")
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(InvalidRequestError, match="holds no prompt"):
        quantized(original, tmp_path / "out", "w8a8", prompts=tmp_path / "prompts.txt")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        quantized(original, tmp_path / "out", "w8a8", prompts=tmp_path / "absent.txt")
    assert not (tmp_path / "out").exists()
