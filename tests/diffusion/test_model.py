"""A whole model against diffusers' pipeline: prompts, guided denoising, decoding and encoding."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions
from fuserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from tests.diffusion.model_folders import small_sd, small_sdxl
from tests.diffusion.oracles import assert_close, nhwc, randomized

PROMPTS = ["a red circle above", "naïve café!"]
REFERENCE = DiffusionOptions(executor="reference")
NEAR = 2e-5
"""Both sides compute in float32 here."""


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return small_sd(folder), folder / "model"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sdxl")
    return small_sdxl(folder), folder / "model"


def painted(model: DiffusionModel, pipeline: Any, latents: torch.Tensor, **prompts: Any) -> Any:
    """Four guided steps of ours from the latents, with diffusers' scheduler, and the decoding."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    height, width = (2 ** (len(pipeline.vae.config.block_out_channels) - 1) * s for s in (8, 12))
    positive = model.encode_prompts(PROMPTS)
    negative = model.encode_prompts(prompts.get("negative", ["", ""]), negative=True)
    timesteps = scheduler.timesteps.numpy().astype(np.float32)
    denoiser = model.denoiser(positive, negative, timesteps, height, width)
    sample = latents
    for step, timestep in enumerate(scheduler.timesteps):
        below, above = denoiser.predict(nhwc(sample), step)
        assert below is not None
        guided = torch.from_numpy(below + 5.0 * (above - below)).permute(0, 3, 1, 2)
        sample = scheduler.step(guided, timestep, sample).prev_sample
    return model.decode(nhwc(sample))


@pytest.mark.parametrize("executor", ["native", "reference"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("negative", [None, ["circle", "a circle"]])
def test_a_picture_equals_the_pipelines(
    executor: Literal["native", "reference"],
    kind: str,
    negative: list[str] | None,
    request: pytest.FixtureRequest,
) -> None:
    pipeline, folder = request.getfixturevalue(kind)
    model = DiffusionModel.load(folder, DiffusionOptions(executor=executor))
    latents = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        PROMPTS,
        negative_prompt=negative,
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=latents.clone(),
        output_type="np",
    ).images
    ours = painted(model, pipeline, latents, **({"negative": negative} if negative else {}))
    assert theirs.std() > 0.02
    assert np.abs(ours - theirs).max() < 2e-4


def test_the_properties_say_what_the_configs_say(sd: tuple[Any, Path]) -> None:
    model = DiffusionModel.load(sd[1], REFERENCE)
    assert (model.latent_channels, model.in_channels) == (4, 4)
    assert (model.scale_factor, model.size_multiple, model.sample_size) == (4, 16, 8)
    assert model.scaling_factor == 0.18215
    assert model.prediction_type == "epsilon"
    assert model.scheduler_config["_class_name"] == "DDIMScheduler"
    assert not model.embeds_guidance


def test_images_are_encoded_as_diffusers_encodes_them(sd: tuple[Any, Path]) -> None:
    pipeline, folder = sd
    images = torch.rand((2, 3, 16, 24), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        theirs = pipeline.vae.encode(2 * images - 1).latent_dist.parameters
    ours = DiffusionModel.load(folder, REFERENCE).encode(nhwc(images))
    assert_close(ours, nhwc(theirs), NEAR)


def test_a_prompt_is_encoded_once_and_the_empty_one_is_kept(sd: tuple[Any, Path]) -> None:
    model = DiffusionModel.load(sd[1], REFERENCE)
    first = model.encode_prompts(["", "a red circle"])
    together = model.encode_prompts(["a red circle", "", "a red circle"])
    np.testing.assert_array_equal(together.hidden, first.hidden[[1, 0, 1]])
    encoder = model._prompts
    model.encode_prompts([f"red {number}" for number in range(80)])
    assert "" in encoder._cache and "a red circle" not in encoder._cache
    assert len(encoder._cache) == 64


def test_an_image_does_not_depend_on_its_place_in_the_batch(sd: tuple[Any, Path]) -> None:
    """Bit for bit, and guided or not."""
    model = DiffusionModel.load(sd[1])
    latents = nhwc(torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(7)))
    negative = model.encode_prompts(["", "circle"], negative=True)
    timesteps = np.array([981, 1], np.float32)
    pair = model.denoiser(model.encode_prompts(PROMPTS), negative, timesteps, 32, 32)
    below, above = pair.predict(latents, 1)  # two images of each prompt
    assert below is not None
    for image, prompt in enumerate([0, 0, 1, 1]):
        alone = model.denoiser(
            model.encode_prompts([PROMPTS[prompt]]),
            model.encode_prompts([["", "circle"][prompt]], negative=True),
            timesteps,
            32,
            32,
        )
        one_below, one_above = alone.predict(latents[image : image + 1], 1)
        assert one_below is not None
        np.testing.assert_array_equal(below[image : image + 1], one_below)
        np.testing.assert_array_equal(above[image : image + 1], one_above)
        unguided_below, unguided = alone.predict(latents[image : image + 1], 1, guided=False)
        assert unguided_below is None
        np.testing.assert_array_equal(unguided, one_above)


def test_half_precision_weights_stay_near(sd: tuple[Any, Path]) -> None:
    half = DiffusionModel.load(sd[1], DiffusionOptions(dtype="float16"))
    full = DiffusionModel.load(sd[1])
    latents = nhwc(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7)))
    results = []
    for model in (half, full):
        denoiser = model.denoiser(
            model.encode_prompts(PROMPTS[:1]), None, np.array([401.0], np.float32), 32, 32
        )
        results.append(denoiser.predict(latents, 0)[1])
    assert_close(*results, 1e-2)
    assert not np.array_equal(*results)


def test_the_guidance_scale_is_told_to_an_lcm(tmp_path: Path) -> None:
    pipeline = small_sd(tmp_path, time_cond_proj_dim=16)
    model = DiffusionModel.load(tmp_path / "model", REFERENCE)
    assert model.embeds_guidance
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(8))
    prompt = model.encode_prompts(PROMPTS[:1])
    denoiser = model.denoiser(
        prompt, None, np.array([499.0], np.float32), 32, 32, guidance_scale=8.5
    )
    condition = pipeline.get_guidance_scale_embedding(torch.tensor([7.5]), embedding_dim=16)
    with torch.inference_mode():
        hidden = torch.from_numpy(prompt.hidden)
        theirs = pipeline.unet(latents, 499, hidden, timestep_cond=condition).sample
    below, ours = denoiser.predict(nhwc(latents), 0)
    assert below is None
    assert_close(ours, nhwc(theirs), NEAR)


def test_another_autoencoder_can_take_the_models_place(
    sd: tuple[Any, Path], tmp_path: Path
) -> None:
    config = {"num_encoder_blocks": [1, 1, 1], "num_decoder_blocks": [1, 1, 1]}
    widths = {f"{side}_block_out_channels": [16] * 3 for side in ("encoder", "decoder")}
    tiny = randomized(AutoencoderTiny(**config, **widths))
    tiny.save_pretrained(tmp_path)
    model = DiffusionModel.load(sd[1], DiffusionOptions(executor="reference", vae=tmp_path))
    latents = torch.randn((1, 4, 6, 5), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        decoded = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        images = torch.rand((1, 3, 8, 12), generator=torch.Generator().manual_seed(9))
        encoded = tiny.encode(2 * images - 1).latents
    assert np.abs(model.decode(nhwc(latents)) - nhwc(decoded)).max() < 1e-5
    moments = model.encode(nhwc(images))
    assert_close(moments[..., :4], nhwc(encoded), NEAR)
    assert (moments[..., 4:] == -30).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_at_rest_gives_its_working_memory_back(sd: tuple[Any, Path]) -> None:
    model = DiffusionModel.load(sd[1])
    latents = np.zeros((1, 96, 96, 4), np.float32)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    wanted = model.decode(latents)
    while_ready = resident_bytes()
    model.release()
    assert resident_bytes() < while_ready - 4 * 96 * 96 * 4 * 4 * 16  # one of the widest values
    assert np.array_equal(model.decode(latents), wanted)


def changed_copy(folder: Path, target: Path, part: str, **fields: Any) -> Path:
    """The model with other fields in the config of a part; everything else is linked."""
    target.mkdir()
    for one in folder.iterdir():
        (target / one.name).symlink_to(one)
    (target / part).unlink()
    if (folder / part).is_file():
        config, file = json.loads((folder / part).read_text()), target / part
    else:
        (target / part).mkdir()
        for one in (folder / part).iterdir():
            if one.name != "config.json":
                (target / part / one.name).symlink_to(one)
        config = json.loads((folder / part / "config.json").read_text())
        file = target / part / "config.json"
    file.write_text(json.dumps({**config, **fields}))
    return target


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "class_embed_type", "timestep"),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "addition_embed_type", "image"),
        ("unet", "encoder_hid_dim_type", "text_proj"),
        ("unet", "down_block_types", ["AttnDownBlock2D"] * 3),
        ("unet", "mid_block_type", "UNetMidBlock2D"),
        ("unet", "block_out_channels", [32, 64]),
        ("unet", "attention_head_dim", [4, 5, 4]),
        ("unet", "cross_attention_dim", 25),
        ("unet", "act_fn", "gelu"),
        ("vae", "latents_mean", [0.0, 0.1, 0.2, 0.3]),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        ("vae", "act_fn", "relu"),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "num_attention_heads", 5),
        ("model_index.json", "_class_name", "FluxPipeline"),
        ("model_index.json", "unet", ["diffusers", "UNet3DConditionModel"]),
        ("model_index.json", "text_encoder", ["transformers", "T5EncoderModel"]),
    ],
)
def test_an_unsupported_configuration_names_its_field(
    sd: tuple[Any, Path], tmp_path: Path, part: str, field: str, value: Any
) -> None:
    folder = changed_copy(sd[1], tmp_path / "model", part, **{field: value})
    with pytest.raises(UnsupportedModelError, match=field) as caught:
        DiffusionModel.load(folder, REFERENCE)
    assert part.removesuffix(".json") in str(caught.value) or field == "_class_name"


def test_weights_of_another_config_are_refused_before_any_is_read(
    sd: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = changed_copy(sd[1], tmp_path / "wide", "unet", in_channels=5)
    with pytest.raises(CheckpointError, match=r"conv_in.*asks for \[32, 5, 3, 3\]"):
        DiffusionModel.load(folder, REFERENCE)
    folder = changed_copy(sd[1], tmp_path / "deep", "vae", layers_per_block=3)
    with pytest.raises(CheckpointError, match=r"resnets\.3.* is not in the checkpoint"):
        DiffusionModel.load(folder, REFERENCE)
    folder = changed_copy(sd[1], tmp_path / "words", "text_encoder", vocab_size=7)
    with pytest.raises(CheckpointError, match="token_embedding"):
        DiffusionModel.load(folder, REFERENCE)


def test_pickles_and_missing_parts_are_refused(sd: tuple[Any, Path], tmp_path: Path) -> None:
    folder = changed_copy(sd[1], tmp_path / "model", "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match="pickle"):
        DiffusionModel.load(folder, REFERENCE)
    (folder / "vae").unlink()
    with pytest.raises(CheckpointError, match=r"pickle|vae"):
        DiffusionModel.load(folder, REFERENCE)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        DiffusionModel.load(tmp_path, REFERENCE)


def test_names_of_old_autoencoders_are_understood(sd: tuple[Any, Path], tmp_path: Path) -> None:
    folder = changed_copy(sd[1], tmp_path / "model", "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert renamed.keys() != state.keys()
    save_file(renamed, file)
    latents = np.ones((1, 4, 4, 4), np.float32)
    ours = DiffusionModel.load(folder, REFERENCE).decode(latents)
    np.testing.assert_array_equal(ours, DiffusionModel.load(sd[1], REFERENCE).decode(latents))


def test_sizes_and_prompts_are_checked(sd: tuple[Any, Path]) -> None:
    model = DiffusionModel.load(sd[1], REFERENCE)
    prompt = model.encode_prompts(["a"])
    with pytest.raises(InvalidRequestError, match="height=40 must be a multiple of 16"):
        model.denoiser(prompt, None, np.ones(1, np.float32), 40, 32)
    with pytest.raises(InvalidRequestError, match="2 negative prompts for 1"):
        model.denoiser(prompt, model.encode_prompts(["", ""]), np.ones(1, np.float32), 32, 32)
    two = model.denoiser(model.encode_prompts(["a", "b"]), None, np.ones(1, np.float32), 32, 32)
    for shape in ((3, 8, 8, 4), (2, 8, 9, 4), (2, 8, 8, 9)):
        with pytest.raises(InvalidRequestError, match=r"wanted are \[8, 8, 4\]"):
            two.predict(np.zeros(shape, np.float32), 0)
    with pytest.raises(InvalidRequestError, match="no prompt"):
        model.encode_prompts([])
    with pytest.raises(InvalidRequestError, match="must be text"):
        model.encode_prompts([b"bytes"])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="no multiple of 4"):
        model.encode(np.zeros((1, 30, 32, 3), np.float32))
