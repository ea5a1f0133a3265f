"""What the generation loop asks of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.step_cache import StepCache

FloatArray = NDArray[np.float32]
Embeds = TypeVar("Embeds")


class Denoiser(Protocol):
    """A model bound to prompts, timesteps and a size."""

    def predict(
        self, latents: FloatArray, step: int, guided: bool = True
    ) -> tuple[FloatArray | None, FloatArray]:
        """Predictions for the negative and the positive prompts, each as the latents in shape.

        Args:
            latents: as the scheduler scales them, ``[images, height, width, channels]``.
            step: index of the timestep.
            guided: False computes the positive ones alone.
        """
        ...

    def share(self, step: int, guided: bool = True) -> float:
        """Part of a full step's arithmetic that ``predict`` would do now; 1 is all of it."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory of its own, which goes with it."""
        ...


class ImageModel(Protocol[Embeds]):
    """Text encoder, denoiser and autoencoder of a checkpoint."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The checkpoint's ``scheduler_config.json``."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are denoised."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels that the denoiser reads: more for an inpainting model."""
        ...

    @property
    def scale_factor(self) -> int:
        """Pixels of a side over latents."""
        ...

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        ...

    @property
    def sample_size(self) -> int:
        """Side of the latents that the model was trained on."""
        ...

    @property
    def scaling_factor(self) -> float:
        """What encoded images are multiplied by to have unit variance."""
        ...

    @property
    def embeds_guidance(self) -> bool:
        """The denoiser is told the guidance scale (LCM), and needs no negative prompt."""
        ...

    @property
    def num_cache_branches(self) -> int:
        """Skip connections at which step caching can take over: ``cache_branch`` is below this."""
        ...

    def encode_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> Embeds:
        """What the denoiser needs to know of each prompt."""
        ...

    def denoiser(
        self,
        positive: Embeds,
        negative: Embeds | None,
        timesteps: NDArray[np.float32],
        height: int,
        width: int,
        *,
        guidance_scale: float = 1.0,
        step_cache: StepCache | None = None,
    ) -> Denoiser:
        """Bind prompts, timesteps and a size in pixels."""
        ...

    def decode(self, latents: FloatArray) -> FloatArray:
        """Latents to images, ``[images, height, width, 3]``, values from 0 to 1."""
        ...

    def encode(self, images: FloatArray) -> FloatArray:
        """Images to means and log variances of latents not scaled yet, twice the channels.

        Log variances of -30 mean that there is nothing to draw.
        """
        ...
