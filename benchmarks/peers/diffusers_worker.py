"""diffusers in fp32: eager PyTorch, in its default memory format or in channels_last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from image_worker import TIMESTEP, Array, ImageWork, run


class Diffusers:
    """A UNet or an autoencoder; ``--option channels_last=1`` changes its memory format."""

    def __init__(self, work: ImageWork) -> None:
        torch.set_num_threads(work.threads)
        kind = UNet2DConditionModel if work.part == "unet" else AutoencoderKL
        self.work, self.model = work, kind.from_pretrained(work.folder).eval()
        self.latents = torch.from_numpy(work.latents()).permute(0, 3, 1, 2).contiguous()
        if work.option("channels_last"):
            self.model = self.model.to(memory_format=torch.channels_last)
            self.latents = self.latents.to(memory_format=torch.channels_last)
        self.text = torch.from_numpy(work.text())

    @torch.inference_mode()
    def run(self) -> Array:
        if self.work.part == "unet":
            pair = torch.cat([self.latents, self.latents])
            result = self.model(pair, TIMESTEP, self.text).sample
        else:
            result = self.model.decode(self.latents).sample
        return result.permute(0, 2, 3, 1).contiguous().numpy()

    def details(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    run(Diffusers)
