"""Write diffusers' UNet or decoder as an IR of fixed shapes for OpenVINO, in fp32:
``openvino_convert.py SITE_PACKAGES FOLDER unet|vae SIZE TARGET``."""

from __future__ import annotations

import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from image_worker import LATENT_CHANNELS, TEXT_CHANNELS, TIMESTEP, TOKENS
from torch import nn


class Step(nn.Module):
    """A UNet from tensors to a tensor."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of a guided pair."""
        return self.unet(latents, timestep, text, return_dict=False)[0]


class Decoder(nn.Module):
    """An autoencoder's decoder, likewise."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """The image of latents."""
        return self.vae.decode(latents, return_dict=False)[0]


def main() -> None:
    """Convert and write."""
    site_packages, folder, part, size, target = sys.argv[1:]
    sys.path.append(site_packages)  # behind this interpreter's own packages
    import openvino

    side = int(size) // 8
    module: nn.Module
    if part == "unet":
        module = Step(UNet2DConditionModel.from_pretrained(folder).eval())
        inputs = [
            torch.zeros(2, LATENT_CHANNELS, side, side),
            torch.tensor(float(TIMESTEP)),
            torch.zeros(2, TOKENS, TEXT_CHANNELS),
        ]
    else:
        module = Decoder(AutoencoderKL.from_pretrained(folder).eval())
        inputs = [torch.zeros(1, LATENT_CHANNELS, side, side)]
    with torch.inference_mode():
        model = openvino.convert_model(module, example_input=tuple(inputs))
    model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    openvino.save_model(model, target, compress_to_fp16=False)


if __name__ == "__main__":
    main()
