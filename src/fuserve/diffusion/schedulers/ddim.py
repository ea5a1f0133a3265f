"""DDIM: Song, Meng and Ermon, Denoising Diffusion Implicit Models (2020)."""

from __future__ import annotations

from math import sqrt

import numpy as np

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import TimedNoise
from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import (
    FloatArray,
    Update,
    clean_from,
    noise_from,
    prediction_type,
)
from fuserve.diffusion.schedulers.spacing import check_num_steps, whole_timesteps


class DDIM(TimedNoise):
    """Eq. 12 with eta 0: the step is deterministic.

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        fields.refuse("thresholding")
        schedule = NoiseSchedule.read(fields, "exact")
        self._train = num_train = schedule.num_train_timesteps
        check_num_steps(num_steps, num_train)
        self._schedule = schedule
        self._kind = prediction_type(fields)
        clips = fields.flag("clip_sample", True)
        self._clip = fields.number("clip_sample_range", 1.0) if clips else None
        self._final = 1.0 if fields.flag("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
        self.timesteps = whole_timesteps(fields, num_train, num_steps)
        self._stride = num_train // num_steps

    def draws_noise(self, index: int) -> bool:
        """Never."""
        return False

    def step(
        self,
        sample: FloatArray,
        prediction: FloatArray,
        index: int,
        noise: FloatArray | None = None,
    ) -> Update:
        """From the timestep to the one a stride before it."""
        timestep = int(self.timesteps[index])
        before = timestep - self._stride
        alpha, sigma = self._schedule.alpha_sigma(timestep)
        product = float(self._schedule.alphas_cumprod[before] if before >= 0 else self._final)
        clean = clean_from(self._kind, sample, prediction, alpha, sigma)
        direction = noise_from(self._kind, sample, prediction, alpha, sigma)
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        return Update(sqrt(product) * clean + sqrt(1.0 - product) * direction, clean)
