"""Single-file checkpoints give the parts that diffusers' own conversion gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fuserve.architectures.fields import Fields
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.single_file import SD15, SDXL, Family, family_of, parts_of, read_single_file
from fuserve.diffusion.single_file_names import (
    open_clip_names,
    stored_names,
    unet_modules,
    vae_modules,
)
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.vae_spec import vae_spec
from fuserve.errors import CheckpointError, UnsupportedModelError
from tests.diffusion.model_folders import small_sd, text_config, tokenizer
from tests.diffusion.oracles import SDXL_UNET, UNET, VAE, assert_close, nhwc, randomized

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
State = dict[str, torch.Tensor]


def full(config: dict[str, Any]) -> dict[str, Any]:
    """The config as diffusers' conversion reads it."""
    return {
        "class_embed_type": None,
        "addition_embed_type": None,
        "num_class_embeds": None,
    } | config


def assert_same(converted: State, original: State) -> None:
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(converted[name].reshape(tensor.shape), tensor), name


def old_unet(config: dict[str, Any], model: torch.nn.Module) -> State:
    state = model.state_dict()
    names = stored_names(state, unet_modules(unet_spec(Fields(config))), UNET_PREFIX)
    return {names[name].name: tensor for name, tensor in state.items()}


def old_vae(config: dict[str, Any], model: torch.nn.Module) -> State:
    state = model.state_dict()
    names = stored_names(state, vae_modules(vae_spec(Fields(config))), VAE_PREFIX)
    is_attention = {name for name in state if ".to_" in name and name.endswith("weight")}
    return {  # these files have the attention's matrices as 1x1 convolutions
        names[name].name: tensor[:, :, None, None] if name in is_attention else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("config", [{**UNET, "layers_per_block": 2}, SDXL_UNET])
def test_names_of_the_network_are_those_that_diffusers_converts(config: dict[str, Any]) -> None:
    model = UNet2DConditionModel(**config)
    old = old_unet(config, model)
    assert_same(convert_ldm_unet_checkpoint(old, full(config)), model.state_dict())


def test_names_of_the_autoencoder_are_those_that_diffusers_converts() -> None:
    model = AutoencoderKL(**VAE)
    assert_same(convert_ldm_vae_checkpoint(old_vae(VAE, model), VAE), model.state_dict())


def test_the_full_configs_of_both_families_are_those_of_their_folders() -> None:
    """Sizes that are known of the published models."""
    for family, millions in ((SD15, 859.5), (SDXL, 2567.5)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**family.unet)
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert abs(count / 1e6 - millions) < 0.1
        names = stored_names(unet.state_dict(), unet_modules(unet_spec(Fields(family.unet))), "")
        assert len({place.name for place in names.values()}) == len(names)


def old_open_clip(model: torch.nn.Module, config: dict[str, Any], prefix: str) -> State:
    """The state of a projected text encoder in OpenCLIP's names."""
    spec = text_encoder_spec(Fields(config), projected=True)
    state, stacks, old = model.state_dict(), {}, {}
    for name, place in open_clip_names(spec, prefix).items():
        tensor = state[name]
        if place.part is not None:
            stacks.setdefault(place.name, {})[place.part[0]] = tensor
        else:
            old[place.name] = tensor.T.contiguous() if place.transposed else tensor
    return old | {
        name: torch.cat([parts[index] for index in range(3)]) for name, parts in stacks.items()
    }


def test_names_of_open_clip_are_those_that_diffusers_converts(tmp_path: Path) -> None:
    config = text_config(tokenizer(tmp_path), projection_dim=24)
    model = randomized(CLIPTextModelWithProjection(config))
    prefix = "conditioner.embedders.1.model."
    old = old_open_clip(model, config.to_dict(), prefix)
    assert_same(convert_open_clip_checkpoint(model, old, prefix), model.state_dict())


def test_a_single_file_paints_like_the_folder(tmp_path: Path) -> None:
    pipeline = small_sd(tmp_path)
    text = {
        f"cond_stage_model.transformer.text_model.{name}": tensor
        for name, tensor in pipeline.text_encoder.state_dict().items()
    }
    state = old_unet(UNET, pipeline.unet) | old_vae(VAE, pipeline.vae) | text
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    stored = StoredTensors.of_file(file)
    assert family_of(stored) is SD15
    config = pipeline.text_encoder.config.to_dict()
    small = Family(UNET, VAE, (config,), SD15.clip, None)
    parts = parts_of(stored, small, tmp_path / "model" / "tokenizer")
    parts.check()
    options = DiffusionOptions(executor="reference")
    ours, folders = DiffusionModel(parts, options), DiffusionModel.load(tmp_path / "model", options)
    prompt = ours.encode_prompts(["a red circle"])
    np.testing.assert_array_equal(prompt.hidden, folders.encode_prompts(["a red circle"]).hidden)
    latents = nhwc(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3)))
    times = np.array([301.0], np.float32)
    _, one = ours.denoiser(prompt, None, times, 32, 32).predict(latents, 0)
    _, other = folders.denoiser(prompt, None, times, 32, 32).predict(latents, 0)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(ours.decode(latents), folders.decode(latents))
    with pytest.raises(CheckpointError, match=r"input_blocks|conv_in|time_embed"):
        read_single_file(file, tmp_path / "model" / "tokenizer").check()  # no full-size weights


def test_sdxls_second_text_encoder_is_read_from_open_clips_names(tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "words")
    first = text_config(words, hidden_size=12)
    second = text_config(words, hidden_size=12, hidden_act="gelu", projection_dim=16)
    models = [
        randomized(CLIPTextModel(first), 1),
        randomized(CLIPTextModelWithProjection(second), 2),
    ]
    assert SDXL.open_clip is not None
    clip = {
        f"{SDXL.clip}text_model.{name}": tensor for name, tensor in models[0].state_dict().items()
    }
    state = clip | old_open_clip(models[1], second.to_dict(), SDXL.open_clip)
    state |= old_unet(SDXL_UNET, UNet2DConditionModel(**SDXL_UNET))
    state |= old_vae(VAE, AutoencoderKL(**VAE))
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    stored = StoredTensors.of_file(file)
    assert family_of(stored) is SDXL
    family = Family(SDXL_UNET, VAE, (first.to_dict(), second.to_dict()), SDXL.clip, SDXL.open_clip)
    parts = parts_of(stored, family, tmp_path / "words")
    parts.check()
    model = DiffusionModel(parts, DiffusionOptions(executor="reference"))
    embeds = model.encode_prompts(["a red circle!"])
    hidden = []
    for index, part in enumerate(parts.texts):
        ids = torch.from_numpy(part.tokenizer(["a red circle!"]))
        with torch.inference_mode():
            output = models[index](ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    assert parts.texts[1].tokenizer.padding == words.convert_tokens_to_ids("!")
    assert_close(embeds.hidden, torch.cat(hidden, -1).numpy(), 2e-5)
    assert embeds.pooled is not None
    assert_close(embeds.pooled, output.text_embeds.numpy(), 2e-5)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedModelError, match="no single-file checkpoint"):
        DiffusionModel.load(
            tmp_path / "other.safetensors",
            DiffusionOptions(executor="reference", tokenizer=tmp_path),
        )
    (tmp_path / "model.ckpt").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match="pickle"):
        DiffusionModel.load(tmp_path / "model.ckpt")
