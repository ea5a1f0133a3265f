"""A tiny Stable Diffusion of random weights: diffusers' modules behind our model interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fuserve.diffusion.step_cache import StepCache

TEXT_CHANNELS, TEXT_TOKENS = 32, 7


def tiny_unet(in_channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(in_channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_CHANNELS,
        attention_head_dim=4,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()


def embedding(prompt: str) -> torch.Tensor:
    """Stands for a text encoder: ``[1, tokens, channels]`` that depend on the prompt."""
    seed = sum(prompt.encode()) + 1
    shape = (1, TEXT_TOKENS, TEXT_CHANNELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def as_nhwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


class DiffusersDenoiser:
    num_bytes = 0

    def share(self, step: int, guided: bool = True) -> float:
        return 1.0

    def __init__(
        self,
        unet: UNet2DConditionModel,
        positive: torch.Tensor,
        negative: torch.Tensor | None,
        timesteps: np.ndarray,
    ) -> None:
        self.unet, self.positive, self.negative = unet, positive, negative
        self.timesteps = torch.from_numpy(timesteps)
        self.calls: list[bool] = []

    @torch.no_grad()
    def predict(
        self, latents: np.ndarray, step: int, guided: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray]:
        self.calls.append(guided)
        seen = as_nchw(latents)
        if not guided:
            return None, as_nhwc(self.unet(seen, self.timesteps[step], self.positive).sample)
        assert self.negative is not None
        text = torch.cat([self.negative, self.positive])
        both = self.unet(torch.cat([seen, seen]), self.timesteps[step], text).sample
        negative, positive = both.chunk(2)
        return as_nhwc(negative), as_nhwc(positive)


class DiffusersModel:
    latent_channels = 4

    def __init__(self, scheduler_config: Mapping[str, Any], in_channels: int = 4) -> None:
        self.unet, self.vae = tiny_unet(in_channels), tiny_vae()
        self.scheduler_config = scheduler_config
        self.in_channels = in_channels
        self.scale_factor = self.size_multiple = 2
        self.embeds_guidance = False
        self.sample_size = 8
        self.num_cache_branches = 0
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.denoisers: list[DiffusersDenoiser] = []
        self.decoded = 0

    def encode_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> torch.Tensor:
        return torch.cat([embedding(prompt) for prompt in prompts])

    def denoiser(
        self,
        positive: torch.Tensor,
        negative: torch.Tensor | None,
        timesteps: np.ndarray,
        height: int,
        width: int,
        *,
        guidance_scale: float = 1.0,
        step_cache: StepCache | None = None,
    ) -> DiffusersDenoiser:
        self.denoisers.append(DiffusersDenoiser(self.unet, positive, negative, timesteps))
        return self.denoisers[-1]

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        self.decoded += 1
        images = self.vae.decode(as_nchw(latents) / self.scaling_factor).sample
        return as_nhwc((images / 2 + 0.5).clamp(0, 1))

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        moments = self.vae.encode(as_nchw(images * 2 - 1).float()).latent_dist.parameters
        return as_nhwc(moments)
