"""What a user can ask of a picture beside its prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.step_cache import StepCache
from fuserve.errors import InvalidRequestError

FloatArray = NDArray[np.float32]

MAX_IMAGES = 64
MAX_SIDE = 8192


@dataclass(frozen=True, slots=True, eq=False)
class ImageParams:
    """How pictures are made; checked when it is built.

    Attributes:
        negative_prompt: what the pictures shall not show.
        steps: denoising steps; None takes 20, or 4 with the scheduler of a distilled model (LCM).
        guidance_scale: how much the prompt is exaggerated; up to 1 there is no guidance, a step
            then costs half, and the negative prompt means nothing.
        guidance_interval: part of the steps that are guided, as two fractions of the run: early and
            late steps need it least (Kynkäänniemi et al., arXiv 2404.07724).
        guidance_rescale: how far guidance's excess contrast is taken back, 0 to 1.
        cache_interval: every so many steps one computes the whole network, and those between reuse
            its deep part (step caching, DeepCache: arXiv 2312.00858). 1 computes all of every step.
        cache_branch: the skip connection, counted from the latents, up to which every step is
            computed; higher ones save less and stay nearer to the picture without the cache.
        width: pixels; None takes the initial image's, else the model's own.
        height: likewise.
        num_images: how many pictures of each prompt, with the seeds ``seed``, ``seed + 1`` and on.
        seed: as ``torch.manual_seed`` takes it; None draws one.
        scheduler: one of ``fuserve.diffusion.schedulers.SCHEDULER_NAMES``; None takes the model's.
        init_image: start from this picture, ``[height, width, 3]``, values from 0 to 1.
        strength: how much of the initial image is made anew: 1 all of it. None takes 0.8, and 1
            with a mask.
        mask: 1 where the initial image is made anew, 0 where it stays, ``[height, width]``.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    cache_interval: int = 1
    cache_branch: int = 0
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    seed: int | None = None
    scheduler: str | None = None
    init_image: FloatArray | None = None
    strength: float | None = None
    mask: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InvalidRequestError(f"steps={self.steps} must be at least 1.")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0.0:
            raise InvalidRequestError(f"guidance_scale={self.guidance_scale} must be 0 or more.")
        start, end = self.guidance_interval
        if not 0.0 <= start <= end <= 1.0:
            raise InvalidRequestError(
                f"guidance_interval={self.guidance_interval} must be two growing fractions of 1."
            )
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise InvalidRequestError(
                f"guidance_rescale={self.guidance_rescale} must be between 0 and 1."
            )
        if self.cache_interval < 1:
            raise InvalidRequestError(f"cache_interval={self.cache_interval} must be at least 1.")
        if self.cache_branch < 0:
            raise InvalidRequestError(f"cache_branch={self.cache_branch} must be 0 or more.")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise InvalidRequestError(f"{name}={side} must be between 1 and {MAX_SIDE}.")
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise InvalidRequestError(
                f"num_images={self.num_images} must be between 1 and {MAX_IMAGES}."
            )
        self._check_images()

    @property
    def step_cache(self) -> StepCache | None:
        """Which steps reuse the network's deep part; None where all are full."""
        if self.cache_interval == 1:
            return None
        return StepCache(self.cache_interval, self.cache_branch)

    @property
    def effective_strength(self) -> float:
        """``strength``, or what stands for it."""
        if self.strength is not None:
            return self.strength
        return 0.8 if self.mask is None else 1.0

    def _check_images(self) -> None:
        image, mask = self.init_image, self.mask
        if image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(f"{name} needs an init_image.")
            return
        if image.ndim != 3 or image.shape[2] != 3:
            raise InvalidRequestError(
                f"init_image has the shape {image.shape}; it must be [height, width, 3]."
            )
        if mask is not None and mask.shape != image.shape[:2]:
            raise InvalidRequestError(
                f"mask has the shape {mask.shape}, init_image {image.shape}: their heights and "
                "widths must be the same."
            )
        if self.strength is not None and not 0.0 < self.strength <= 1.0:
            raise InvalidRequestError(f"strength={self.strength} must be above 0 and at most 1.")
