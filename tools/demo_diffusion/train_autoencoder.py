"""Stage 2: the autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.demo_diffusion import network, ranks, scenes

BATCH = 16
LEARNING_RATE = 3e-3
KL_WEIGHT = 2e-4


def train(steps: int, seed: int) -> AutoencoderKL:
    """An autoencoder trained for ``steps`` batches, half scenes and half crowded pictures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1, ranks.rank()])
    captions = scenes.captions(rng)
    model = network.autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 40) * (1 - (step / steps) ** 2)
        optimizer.param_groups[0]["lr"] = rate
        half = BATCH // ranks.count() // 2
        drawn = [scenes.paint_crowd(rng) for _ in range(half)]
        drawn += [scenes.paint(next(captions), rng) for _ in range(half)]
        pictures = to_tensor(np.stack(drawn))
        posterior = model.encode(pictures).latent_dist
        difference = model.decode(posterior.sample()).sample - pictures
        error = difference.square().mean()
        loss = error + 0.2 * difference.abs().mean() + KL_WEIGHT * posterior.kl().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ranks.rank() == 0 and step % 20 == 19:
            psnr = -10 * np.log10(error.item() / 4)
            print(f"autoencoder {step + 1}/{steps}: PSNR {psnr:.1f} dB", flush=True)
    return model


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] as float in [-1, 1], [n, 3, h, w]."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)
