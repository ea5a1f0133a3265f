"""A request for pictures, and what its client hears of it. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.image_params import ImageParams
from fuserve.errors import FuserveError

FloatArray = NDArray[np.float32]
FinishReason = Literal["stop", "abort", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageRequest:
    """Pictures of one prompt, checked.

    Attributes:
        seeds: one for each picture.
        num_previews: of each picture, on its way.
        client: whom it belongs to, for fairness; "" where nobody is told apart.
        arrival_s: by the engine's clock.
        deadline_s: likewise; None is no limit.
    """

    request_id: str
    prompt: str
    params: ImageParams
    seeds: tuple[int, ...]
    num_previews: int
    client: str
    arrival_s: float
    deadline_s: float | None


@dataclass(frozen=True, slots=True, eq=False)
class ImageOutput:
    """What came of a request.

    Attributes:
        num_images: pictures that were finished.
        num_prompt_tokens: tokens of the prompt, the text encoder's marks included.
        num_latents: places of the latents of all finished pictures.
        error: why it failed.
        begun_s: when its first step began, by the engine's clock; None if none did.
    """

    request_id: str
    finish_reason: FinishReason
    num_images: int
    num_prompt_tokens: int
    num_latents: int
    arrival_s: float
    begun_s: float | None
    finished_s: float
    error: FuserveError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """News of one picture, or of the whole request.

    Attributes:
        index: which picture, from 0 on.
        seed: its seed.
        step: denoising steps taken.
        num_steps: denoising steps in all.
        width, height: of the finished picture, in pixels.
        num_latents: places of its latents.
        preview: what it is going to be, ``[height, width, 3]`` from 0 to 1, often smaller.
        image: the picture itself, likewise, once it is finished.
        output: with the last news of a request.
    """

    request_id: str
    index: int = 0
    seed: int = 0
    step: int = 0
    num_steps: int = 0
    width: int = 0
    height: int = 0
    num_latents: int = 0
    preview: FloatArray | None = None
    image: FloatArray | None = None
    output: ImageOutput | None = None
