"""Stage 2: the autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from tools.demo_diffusion import network, ranks, scenes

BATCH = 16
LEARNING_RATE = 3e-3
KL_WEIGHT = 2e-4


def train(steps: int, seed: int) -> AutoencoderKL:
    """An autoencoder trained for ``steps`` batches of crowded pictures."""
    torch.manual_seed(seed)
    model = network.autoencoder().to(memory_format=torch.channels_last)
    rng = np.random.default_rng([seed, 1, ranks.rank()])
    _descend("autoencoder", model, steps, lambda: scenes.paint_crowd(rng))
    return model


def sharpen(model: AutoencoderKL, decoder_steps: int, steps: int, seed: int) -> None:
    """Train the decoder alone on scenes, then the whole on scenes and crowded pictures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 4, ranks.rank()])
    captions = scenes.captions(rng)
    encoder = [model.encoder, model.quant_conv]
    for part in encoder:
        part.requires_grad_(False)
    _descend("decoder", model, decoder_steps, lambda: scenes.paint(next(captions), rng))
    for part in encoder:
        part.requires_grad_(True)

    def either() -> NDArray[np.uint8]:
        crowded = rng.random() < 0.5
        return scenes.paint_crowd(rng) if crowded else scenes.paint(next(captions), rng)

    _descend("sharper", model, steps, either)


def _descend(
    name: str, model: AutoencoderKL, steps: int, draw: Callable[[], NDArray[np.uint8]]
) -> None:
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 40) * (1 - (step / steps) ** 2)
        optimizer.param_groups[0]["lr"] = rate
        pictures = to_tensor(np.stack([draw() for _ in range(BATCH // ranks.count())]))
        posterior = model.encode(pictures).latent_dist
        difference = model.decode(posterior.sample()).sample - pictures
        error = difference.square().mean()
        loss = error + 0.2 * difference.abs().mean() + KL_WEIGHT * posterior.kl().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ranks.rank() == 0 and step % 20 == 19:
            psnr = -10 * np.log10(error.item() / 4)
            print(f"{name} {step + 1}/{steps}: PSNR {psnr:.1f} dB", flush=True)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] as float in [-1, 1], [n, 3, h, w]."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)
