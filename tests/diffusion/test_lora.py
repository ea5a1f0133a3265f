"""LoRA branches compute what merged weights compute, in every layout that trainers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.program import Array
from fuserve.diffusion.single_file_names import unet_modules
from fuserve.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tests.diffusion.model_folders import small_sd
from tests.diffusion.oracles import assert_close, nhwc

REFERENCE = DiffusionOptions(executor="reference")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_MODULES = [
    f"{LAYER}.attn1.to_q",  # stacked with two others, of which one has none
    f"{LAYER}.attn1.to_v",
    f"{LAYER}.attn2.to_k",  # of the prompt's program
    f"{LAYER}.attn1.to_out.0",
    f"{LAYER}.ff.net.0.proj",  # gated
    f"{LAYER}.ff.net.2",
    "down_blocks.0.attentions.0.proj_in",  # a 1x1 convolution after a norm
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.time_emb_proj",  # of the schedule's program
    "up_blocks.2.resnets.1.conv1",  # of two sources
    "up_blocks.1.upsamplers.0.conv",
]
TEXT_MODULES = [
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.2.mlp.fc1",
]
RANK, ALPHA = 3, 2.0

Name = Callable[[str, str], str]


def kohya(network: str, path: str) -> str:
    prefix = "lora_unet_" if network == "unet" else "lora_te_text_model_"
    return prefix + path.replace(".", "_")


def peft(network: str, path: str) -> str:
    return f"{network}.{path}" if network == "unet" else f"{network}.text_model.{path}"


LAYOUTS: dict[str, tuple[Name, tuple[str, str]]] = {
    "kohya": (kohya, (".lora_down.weight", ".lora_up.weight")),
    "peft": (peft, (".lora_A.weight", ".lora_B.weight")),
    "diffusers": (peft, (".lora.down.weight", ".lora.up.weight")),
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return small_sd(folder), folder / "model"


def lora_of(pipeline: Any, seed: int) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Random matrices for the modules above."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for network, paths in (("unet", UNET_MODULES), ("text_encoder", TEXT_MODULES)):
        for path in paths:
            weight = getattr(pipeline, network).get_submodule(path).weight
            inwards, out = tuple(weight.shape[1:]), weight.shape[0]
            down = torch.randn((RANK, *inwards), generator=generator) / RANK
            lora[network, path] = down, torch.randn((out, RANK), generator=generator) / out**0.5
    return lora


def write(file: Path, lora: Any, layout: str, *, alpha: bool = True) -> Path:
    name, (down_end, up_end) = LAYOUTS[layout]
    tensors = {}
    for (network, path), (down, up) in lora.items():
        module = name(network, path)
        tensors[module + down_end] = down.contiguous()
        tensors[module + up_end] = up[:, :, None, None].contiguous() if down.ndim == 4 else up
        if alpha:
            tensors[module + ".alpha"] = torch.tensor(ALPHA)
    save_file(tensors, file)
    return file


def predictions(model: DiffusionModel) -> Array:
    latents = nhwc(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11)))
    positive, negative = model.encode_prompts(["a red circle"]), model.encode_prompts([""])
    times = np.array([401.0], np.float32)
    below, above = model.denoiser(positive, negative, times, 32, 32).predict(latents, 0)
    assert below is not None
    return np.stack([below, above])


def merged(pipeline: Any, loras: list[tuple[Any, float]]) -> Array:
    """diffusers' prediction with the products added to its weights, which are put back."""
    changed = []
    with torch.no_grad():
        for lora, scale in loras:
            for (network, path), (down, up) in lora.items():
                weight = getattr(pipeline, network).get_submodule(path).weight
                changed.append((weight, weight.clone()))
                weight += scale * (up @ down.flatten(1)).view(weight.shape)
        positive, negative = pipeline.encode_prompt("a red circle", "cpu", 1, True, "")
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11))
        text = torch.cat([negative, positive])
        result = pipeline.unet(latents.repeat(2, 1, 1, 1), 401, text).sample
        for weight, before in reversed(changed):
            weight.copy_(before)
    return nhwc(result)[:, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch_equals_the_merged_weights(
    sd: tuple[Any, Path], tmp_path: Path, layout: str
) -> None:
    pipeline, folder = sd
    lora = lora_of(pipeline, 1)
    file = write(tmp_path / "lora.safetensors", lora, layout)
    model = DiffusionModel.load(
        folder, DiffusionOptions(executor="reference", loras=(LoraOption(file, 0.7),))
    )
    theirs = merged(pipeline, [(lora, 0.7 * ALPHA / RANK)])
    plain = merged(pipeline, [])
    assert np.abs(theirs - plain).max() > 0.05 * np.abs(plain).max()
    assert_close(predictions(model), theirs, 5e-5)


@pytest.mark.parametrize("executor", ["native", "reference"])
def test_several_loras_add_up_and_can_be_taken_away(
    sd: tuple[Any, Path], tmp_path: Path, executor: Literal["native", "reference"]
) -> None:
    pipeline, folder = sd
    first, second = lora_of(pipeline, 1), lora_of(pipeline, 2)
    files = [
        write(tmp_path / f"{index}.safetensors", lora, "peft", alpha=False)
        for index, lora in enumerate((first, second))
    ]
    model = DiffusionModel.load(folder, DiffusionOptions(executor=executor))
    plain = predictions(model)
    model.set_loras([LoraOption(files[0], 0.5), LoraOption(files[1], -0.8)])
    assert_close(predictions(model), merged(pipeline, [(first, 0.5), (second, -0.8)]), 5e-5)
    model.set_loras([LoraOption(files[1])])
    assert_close(predictions(model), merged(pipeline, [(second, 1.0)]), 5e-5)
    model.set_loras([])
    np.testing.assert_array_equal(predictions(model), plain)


def test_names_of_single_file_checkpoints_are_understood(
    sd: tuple[Any, Path], tmp_path: Path
) -> None:
    """As kohya's scripts write for SDXL."""
    pipeline, folder = sd
    model = DiffusionModel.load(folder, REFERENCE)
    path = f"{LAYER}.attn1.to_q"
    table = unet_modules(model._parts.unet.spec)
    attention = path.removesuffix(".transformer_blocks.0.attn1.to_q")
    old = path.replace(attention, table[attention])
    assert old == "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    lora = {("unet", path): lora_of(pipeline, 1)["unet", path]}
    file = write(tmp_path / "new.safetensors", lora, "kohya")
    renamed = write(tmp_path / "old.safetensors", {("unet", old): lora["unet", path]}, "kohya")
    model.set_loras([LoraOption(file)])
    expected = predictions(model)
    model.set_loras([LoraOption(renamed)])
    np.testing.assert_array_equal(predictions(model), expected)


def test_what_is_no_lora_of_this_model_is_refused(sd: tuple[Any, Path], tmp_path: Path) -> None:
    model = DiffusionModel.load(sd[1], REFERENCE)
    down, up = torch.zeros(2, 32), torch.zeros(32, 2)
    module = f"unet.{LAYER}.attn1.to_q"

    def refused(tensors: dict[str, torch.Tensor]) -> LoraOption:
        save_file(tensors, tmp_path / "one.safetensors")
        return LoraOption(tmp_path / "one.safetensors")

    with pytest.raises(CheckpointError, match="no module of this model"):
        model.set_loras([refused({"unet.no.such.lora_A.weight": down})])
    with pytest.raises(CheckpointError, match="up matrix is missing"):
        model.set_loras([refused({f"{module}.lora_A.weight": down})])
    with pytest.raises(CheckpointError, match=r"\[2, 31\] and \[32, 2\]"):
        pair = {f"{module}.lora_A.weight": down[:, :31].clone(), f"{module}.lora_B.weight": up}
        model.set_loras([refused(pair)])
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        model.set_loras([refused({f"{module}.lora_magnitude_vector": down})])
    with pytest.raises(UnsupportedModelError, match="LoHa"):
        model.set_loras([refused({f"{module}.hada_w1_a": down})])
    with pytest.raises(ModelNotFoundError, match="no LoRA here"):
        model.set_loras([LoraOption(tmp_path / "absent.safetensors")])
    (tmp_path / "lora.pt").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match="pickle"):
        model.set_loras([LoraOption(tmp_path / "lora.pt")])
