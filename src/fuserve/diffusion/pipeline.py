"""From prompts to pictures, one step at a time."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.guidance import guide
from fuserve.diffusion.image_model import Denoiser, ImageModel
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.noise import NoiseGenerator, image_noise
from fuserve.diffusion.schedulers import Scheduler, is_few_step, make_scheduler
from fuserve.diffusion.start import Start, begin, first_step
from fuserve.errors import InvalidRequestError

FloatArray = NDArray[np.float32]
Stage = Literal["prepare", "denoise", "decode", "done", "cancelled"]

DEFAULT_STEPS = 20
DEFAULT_STEPS_DISTILLED = 4
_SEED_BITS = 32  # all that torch's generator looks at


class ImageTask:
    """Pictures of one size that are denoised together; ``step`` does the next piece of work.

    A task does nothing between steps, so several can take turns, and one can be left at any time.
    Nothing that a picture depends on is shared: it is the same whatever else is in the task.

    Args:
        model: what paints.
        prompts: one for each picture.
        seeds: likewise.
        params: the rest; its ``num_images`` and ``seed`` are not looked at.

    Raises:
        InvalidRequestError: a value that this model cannot take.
        UnsupportedModelError: the model's scheduler, or a field of its config.
    """

    def __init__(
        self,
        model: ImageModel[Any],
        prompts: Sequence[str],
        seeds: Sequence[int],
        params: ImageParams,
    ) -> None:
        if not prompts or len(prompts) != len(seeds):
            raise InvalidRequestError(f"{len(prompts)} prompts for {len(seeds)} seeds.")
        self._model = model
        self._prompts = list(prompts)
        self._params = params
        self.height, self.width = image_size(model, params)
        _check_cache(model, params)
        num_steps = default_steps(model, params)
        self.scheduler: Scheduler = make_scheduler(
            model.scheduler_config, num_steps, params.scheduler
        )
        self._first = first_step(params, num_steps)
        self._is_guided = params.guidance_scale > 1.0 and not model.embeds_guidance
        self._generators = [NoiseGenerator(seed) for seed in seeds]
        self.stage: Stage = "prepare"
        self._index = self._first
        self._start: Start | None = None
        self._denoiser: Denoiser | None = None
        self._sample: FloatArray | None = None
        self._clean: FloatArray | None = None
        self._images: FloatArray | None = None

    @property
    def num_steps(self) -> int:
        """Denoising steps in all."""
        return len(self.scheduler.timesteps) - self._first

    @property
    def steps_done(self) -> int:
        """Denoising steps taken."""
        return self._index - self._first

    @property
    def images(self) -> FloatArray:
        """The pictures, ``[images, height, width, 3]``, values from 0 to 1.

        Raises:
            InvalidRequestError: the task is not done.
        """
        if self._images is None:
            raise InvalidRequestError(f"The pictures are not there yet; the stage is {self.stage}.")
        return self._images

    def step(self) -> None:
        """Encode prompts and initial image, or take one denoising step, or decode."""
        if self.stage == "prepare":
            self._prepare()
        elif self.stage == "denoise":
            self._denoise()
        elif self.stage == "decode":
            assert self._sample is not None
            self._images = self._model.decode(self._sample)
            self._release()
            self.stage = "done"

    def run(self) -> FloatArray:
        """Take all steps that are left, and return the pictures."""
        while self.stage not in ("done", "cancelled"):
            self.step()
        return self.images

    def preview(self) -> FloatArray | None:
        """What the model takes the pictures to be by now, decoded; None before the first step."""
        return None if self._clean is None else self._model.decode(self._clean)

    @property
    def clean(self) -> FloatArray | None:
        """The latents that the last step took for the pictures'; None before the first step."""
        return self._clean

    @property
    def latents(self) -> FloatArray | None:
        """The latents after the last step, ``[images, height, width, channels]``."""
        return self._sample

    @property
    def step_share(self) -> float:
        """Part of a full step's arithmetic that the next one does: below 1 with a cached feature.

        1 in other stages.
        """
        if self.stage != "denoise" or self._denoiser is None:
            return 1.0
        return self._denoiser.share(self._index, self._is_step_guided())

    @property
    def num_bytes(self) -> int:
        """Memory that it holds between steps: latents, rows of text, cached feature, pictures."""
        arrays = {id(each): each for each in (self._sample, self._clean, self._images)}
        start = self._start
        if start is not None:
            kept = () if start.kept is None else (start.kept.latents, start.kept.noise)
            arrays |= {id(each): each for each in (start.latents, start.beside, *kept)}
        own = sum(array.nbytes for array in arrays.values() if array is not None)
        return own + (0 if self._denoiser is None else self._denoiser.num_bytes)

    def cancel(self) -> None:
        """Take no further step, and free what the task holds."""
        if self.stage != "done":
            self._release()
            self.stage = "cancelled"

    def _prepare(self) -> None:
        model, params = self._model, self._params
        positive = model.encode_prompts(self._prompts)
        negative = None
        if self._is_guided:
            negatives = [params.negative_prompt] * len(self._prompts)
            negative = model.encode_prompts(negatives, negative=True)
        timesteps = self.scheduler.timesteps.astype(np.float32)
        # Before the initial image is encoded: this refuses a size for which there is no memory.
        self._denoiser = model.denoiser(
            positive,
            negative,
            timesteps,
            self.height,
            self.width,
            guidance_scale=params.guidance_scale,
            step_cache=params.step_cache,
        )
        factor = model.scale_factor
        size = self.height // factor, self.width // factor
        self._start = begin(model, self.scheduler, params, self._first, self._generators, *size)
        self._sample = self._start.latents
        self.stage = "denoise"

    def _denoise(self) -> None:
        assert self._sample is not None and self._start is not None
        scheduler, index, sample = self.scheduler, self._index, self._sample
        prediction = self._predict(sample, index)
        noise = None
        if scheduler.draws_noise(index):
            noise = image_noise(self._generators, *sample.shape[1:])
        update = scheduler.step(sample, prediction, index, noise)
        sample = update.sample.astype(np.float32, copy=False)
        self._clean = update.clean.astype(np.float32, copy=False)
        self._index = index = index + 1
        if self._start.kept is not None:
            sample = self._start.kept.restore(sample, scheduler, index)
        self._sample = sample
        if index == len(scheduler.timesteps):
            self.stage = "decode"

    def _predict(self, sample: FloatArray, index: int) -> FloatArray:
        """What the model says of the latents, after guidance; an array of our own."""
        assert self._denoiser is not None and self._start is not None
        seen = self.scheduler.scale_input(sample, index).astype(np.float32, copy=False)
        if self._start.beside is not None:
            seen = np.concatenate([seen, self._start.beside], axis=3)
        params = self._params
        negative, positive = self._denoiser.predict(seen, index, self._is_step_guided())
        if negative is None:
            return positive.copy()  # multistep schedulers keep it
        return guide(negative, positive, params.guidance_scale, params.guidance_rescale)

    def _is_step_guided(self) -> bool:
        start, end = self._params.guidance_interval
        return self._is_guided and start <= self.steps_done / self.num_steps < end

    def _release(self) -> None:
        self._start = self._denoiser = self._sample = self._clean = None


def default_steps(model: ImageModel[Any], params: ImageParams) -> int:
    """Denoising steps, where the request does not say."""
    if params.steps is not None:
        return params.steps
    few = is_few_step(model.scheduler_config, params.scheduler)
    return DEFAULT_STEPS_DISTILLED if few else DEFAULT_STEPS


def image_size(model: ImageModel[Any], params: ImageParams) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        InvalidRequestError: they are no multiples of what a latent stands for, or not those of the
            initial image.
    """
    factor = model.size_multiple
    own = model.sample_size * model.scale_factor
    image = params.init_image
    sides = {}
    for axis, name in enumerate(("height", "width")):
        given = None if image is None else image.shape[axis]
        wanted = getattr(params, name)
        side = wanted or given or own
        if given is not None and side != given:
            raise InvalidRequestError(
                f"{name}={side}, but the init_image has {given}: resize it before."
            )
        if side % factor:
            nearest = max(side - side % factor, factor)
            raise InvalidRequestError(
                f"{name}={side} must be a multiple of {factor}, such as {nearest}."
            )
        sides[name] = side
    return sides["height"], sides["width"]


def _check_cache(model: ImageModel[Any], params: ImageParams) -> None:
    if params.step_cache is not None and params.cache_branch >= model.num_cache_branches:
        raise InvalidRequestError(
            f"cache_branch={params.cache_branch} must be below {model.num_cache_branches}, the "
            "number of this model's skip connections."
        )


def seeds_of(params: ImageParams) -> list[int]:
    """A seed for each of ``num_images`` pictures."""
    first = secrets.randbits(_SEED_BITS) if params.seed is None else params.seed
    return [first + i for i in range(params.num_images)]
