"""A model that paints without a network: quick, and held back where a test wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
WAIT_S = 60.0
CHANNELS = 4
FACTOR = 8


class FakeDenoiser:
    num_bytes = 0

    def share(self, step: int, guided: bool = True) -> float:
        return 0.25 if step % 4 and self.prompts[0] in self.model.cheap_prompts else 1.0

    def __init__(self, model: FakeImageModel, prompts: Sequence[str]) -> None:
        self.model, self.prompts = model, prompts

    def predict(self, latents: Array, step: int, guided: bool = True) -> tuple[Array | None, Array]:
        self.model.before_step(self.prompts[0])
        predicted = latents * np.float32(0.5)
        return (predicted * np.float32(0.9) if guided else None), predicted


class FakeImageModel:
    """Latents come out as colours, each place a block of pixels.

    Args:
        before_step: is told the prompt before each denoising step; it may wait, or raise.
    """

    scheduler_config: Mapping[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    latent_channels = in_channels = CHANNELS
    scale_factor = size_multiple = FACTOR
    sample_size = 8
    scaling_factor = 1.0
    embeds_guidance = False
    num_cache_branches = 1

    def __init__(self, before_step: Callable[[str], None] = lambda prompt: None) -> None:
        self.before_step = before_step
        self.prompt_queries = self.prompt_hits = 0
        self.seen: set[str] = set()
        self.num_decodes = self.num_releases = self.num_closes = 0
        self.cheap_prompts: set[str] = set()

    def release(self) -> None:
        self.num_releases += 1

    def close(self) -> None:
        self.num_closes += 1

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split()) + 2

    def encode_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> list[str]:
        self.prompt_queries += len(prompts)
        self.prompt_hits += len([prompt for prompt in prompts if prompt in self.seen])
        self.seen |= set(prompts)
        return list(prompts)

    def denoiser(
        self,
        positive: list[str],
        negative: list[str] | None,
        timesteps: Array,
        height: int,
        width: int,
        **_: Any,
    ) -> FakeDenoiser:
        return FakeDenoiser(self, positive)

    def decode(self, latents: Array) -> Array:
        self.num_decodes += 1
        pixels = latents[..., :3].repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
        return np.clip(pixels * np.float32(0.1) + np.float32(0.5), 0, 1).astype(np.float32)

    def encode(self, images: Array) -> Array:
        n, height, width, _ = images.shape
        blocks = images.reshape(n, height // FACTOR, FACTOR, width // FACTOR, FACTOR, 3)
        means = (blocks.mean(axis=(2, 4)) - 0.5) * 10
        moments = np.full((*means.shape[:3], 2 * CHANNELS), -30, np.float32)
        moments[..., :3] = means
        moments[..., 3] = 0
        return moments


class Gate:
    """Lets steps through one by one, and tells whose they were."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.stepping = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.is_open = False

    def __call__(self, prompt: str) -> None:
        self.steps.append(prompt)
        self.stepping.release()
        if not self.is_open:
            assert self.allowed.acquire(timeout=WAIT_S), "nobody let the step go"

    def wait_for_step(self) -> None:
        assert self.stepping.acquire(timeout=WAIT_S)

    def open(self) -> None:
        self.is_open = True
        self.allowed.release(10_000)
