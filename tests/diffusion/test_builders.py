"""Programs compute what diffusers' and transformers' modules compute, from the same tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fuserve.architectures.fields import Fields
from fuserve.diffusion.program import Array
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_program import (
    guidance_embedding,
    prompt_program,
    sinusoids,
    time_program,
    unet_program,
)
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.vae_program import (
    tiny_decoder_program,
    tiny_encoder_program,
    vae_decoder_program,
    vae_encoder_program,
)
from fuserve.diffusion.vae_spec import tiny_vae_spec, vae_spec
from tests.diffusion.oracles import (
    TEXT,
    UNETS,
    VAE,
    assert_close,
    nhwc,
    randomized,
    run,
    weights_of,
)

TOKENS = 7
TIMESTEP = 437.0


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", UNETS)
def test_a_guided_pair_equals_diffusers_unet(name: str) -> None:
    """Two images with two prompts each, the latents given once for each image."""
    config = UNETS[name]
    model = randomized(UNet2DConditionModel(**config)).double()
    weights, spec = weights_of(model), unet_spec(Fields(config))
    latents, text = random(2, spec.in_channels, 8, 12), random(4, TOKENS, spec.text_channels)
    arguments: dict[str, Any] = {}
    time_inputs: dict[str, Array] = {}
    time_rows = 1
    if spec.text_time is not None:
        time_rows = 4
        pooled = random(4, spec.text_time.in_channels - 6 * spec.text_time.time_dim, seed=2)
        sizes = torch.tensor([[64.0, 96.0, 0.0, 8.0, 64.0, 96.0]]).repeat(4, 1)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled.double(), "time_ids": sizes}
        embedded = sinusoids(sizes.numpy().reshape(-1), spec.text_time.time_dim).reshape(4, -1)
        time_inputs["added"] = np.concatenate([pooled.numpy(), embedded], 1)
    if spec.guidance_channels is not None:
        guidance = guidance_embedding(7.5, spec.guidance_channels)
        arguments["timestep_cond"] = torch.from_numpy(guidance).double()
        time_inputs["guidance"] = guidance
    with torch.inference_mode():
        theirs = model(
            latents.repeat_interleave(2, 0).double(), TIMESTEP, text.double(), **arguments
        ).sample

    time = sinusoids(
        np.full(time_rows, TIMESTEP, np.float32),
        spec.time_channels,
        sin_first=spec.sin_first,
        freq_shift=spec.freq_shift,
    )
    time_inputs["time"] = time
    inputs = run(time_program(spec, time_rows), weights, time_inputs)
    inputs |= run(prompt_program(spec, 4, TOKENS), weights, {"text": text.numpy()})
    program = unet_program(spec, 2, 4, 8, 12, tokens=TOKENS, time_rows=time_rows)
    ours = run(program, weights, {**inputs, "latents": nhwc(latents)})
    assert_close(ours["prediction"], nhwc(theirs))


def test_what_comes_before_the_first_cross_attention_is_computed_once() -> None:
    program = unet_program(unet_spec(Fields(UNETS["sd15"])), 1, 2, 8, 8, tokens=TOKENS)
    shared = [op.name for op in program.ops if op.out.batch == 1]
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert shared[0] == "conv_in"
    assert shared[-1] == f"{first}.attn2.to_q"
    assert f"{first}.attn1" in shared
    reads = {op.name: {value.batch for value in op.reads()} for op in program.ops}
    assert reads["up_blocks.2.resnets.2.conv1"] == {1, 2}  # the skip of conv_in, never copied


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
        {"block_out_channels": [16, 24, 40], "latent_channels": 3, "layers_per_block": 1},
    ],
)
def test_an_autoencoder_equals_diffusers(changes: dict[str, Any]) -> None:
    config = {**VAE, **changes}
    model = randomized(AutoencoderKL(**config)).double()
    weights, spec = weights_of(model), vae_spec(Fields(config))
    latents = random(2, spec.latent_channels, 6, 4)
    images = random(2, 3, 24, 16)
    with torch.inference_mode():
        decoded = model.decode(latents.double()).sample
        encoded = model.encode(images.double()).latent_dist.parameters
    program = vae_decoder_program(spec, 2, 6, 4)
    assert_close(run(program, weights, {"latents": nhwc(latents)})["image"], nhwc(decoded))
    program = vae_encoder_program(spec, 2, 24, 16)
    assert_close(run(program, weights, {"image": nhwc(images)})["moments"], nhwc(encoded))


def test_the_tiny_autoencoder_equals_diffusers() -> None:
    config: dict[str, Any] = {
        "encoder_block_out_channels": [16] * 3,
        "decoder_block_out_channels": [16] * 3,
        "num_encoder_blocks": [1, 2, 1],
        "num_decoder_blocks": [2, 1, 1],
    }
    model = randomized(AutoencoderTiny(**config)).double()
    weights, spec = weights_of(model), tiny_vae_spec(Fields(config))
    latents, images = random(1, 4, 6, 4), random(1, 3, 24, 16)
    with torch.inference_mode():
        decoded = model.decode(latents.double()).sample
        encoded = model.encode(images.double()).latents
    squashed = 3 * np.tanh(nhwc(latents) / 3)
    ours = run(tiny_decoder_program(spec, 1, 6, 4), weights, {"latents": squashed})["image"]
    assert_close(2 * ours - 1, nhwc(decoded))
    halved = (nhwc(images) + 1) / 2
    ours = run(tiny_encoder_program(spec, 1, 24, 16), weights, {"image": halved})["moments"]
    assert_close(ours, nhwc(encoded))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_text_encoder_equals_transformers(activation: str) -> None:
    config = CLIPTextConfig(**TEXT, hidden_act=activation, projection_dim=20)
    model = randomized(CLIPTextModelWithProjection(config)).double()
    weights = weights_of(model)
    spec = text_encoder_spec(Fields(config.to_dict()), projected=True)
    assert spec.projection_channels == 20
    tokens = torch.randint(0, 598, (2, 77), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        theirs = model(tokens, output_hidden_states=True)
    embeddings = weights.float32("text_model.embeddings.token_embedding.weight")[tokens.numpy()]
    embeddings = embeddings + weights.float32("text_model.embeddings.position_embedding.weight")
    program = text_encoder_program(spec, 2, 77, skip=1)
    ours = run(program, weights, {"embeddings": embeddings[:, None]})
    assert_close(ours["last"][:, 0], theirs.last_hidden_state.float().numpy())
    assert_close(ours["hidden"][:, 0], theirs.hidden_states[-2].float().numpy())
