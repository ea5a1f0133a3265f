"""Few steps with consistency models.

Luo, Tan, Huang, Li and Zhao, Latent Consistency Models: Synthesizing High-Resolution Images with
Few-Step Inference (2023), algorithm 3.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import TimedNoise
from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import (
    FloatArray,
    Update,
    clean_from,
    prediction_type,
)
from fuserve.diffusion.schedulers.spacing import check_num_steps

_SIGMA_DATA = 0.5


class LCM(TimedNoise):
    """Predicts the clean picture at each step and noises it again for the next.

    Raises:
        InvalidRequestError: more steps than the distillation had.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        fields.refuse("thresholding")
        # The defaults of this class are those of the latent diffusion that it was distilled from.
        schedule = NoiseSchedule.read(
            fields.with_defaults(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            "exact",
        )
        self._schedule = schedule
        self._kind = prediction_type(fields)
        self._clip = (
            fields.number("clip_sample_range", 1.0) if fields.flag("clip_sample", False) else None
        )
        self._scaling = fields.number("timestep_scaling", 10.0)
        original = fields.integer("original_inference_steps", 50, minimum=1)
        check_num_steps(num_steps, min(original, schedule.num_train_timesteps))
        distilled = np.arange(original, 0, -1.0) * (schedule.num_train_timesteps // original) - 1.0
        chosen = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(np.int64)
        self.timesteps: NDArray[np.float64] = distilled[chosen].astype(np.float64)

    def draws_noise(self, index: int) -> bool:
        """At every step but the last."""
        return index < len(self.timesteps) - 1

    def step(
        self,
        sample: FloatArray,
        prediction: FloatArray,
        index: int,
        noise: FloatArray | None = None,
    ) -> Update:
        """To the clean picture, and from there to the next timestep."""
        timestep = int(self.timesteps[index])
        clean = clean_from(self._kind, sample, prediction, *self._schedule.alpha_sigma(timestep))
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        # The boundary condition, appendix C: the identity at timestep 0.
        scaled = timestep * self._scaling
        distance = scaled**2 + _SIGMA_DATA**2
        skip, out = _SIGMA_DATA**2 / distance, scaled / sqrt(distance)
        clean = out * clean + skip * sample
        if not self.draws_noise(index):
            return Update(clean, clean)
        assert noise is not None
        alpha, sigma = self._schedule.alpha_sigma(int(self.timesteps[index + 1]))
        return Update(alpha * clean + sigma * noise, clean)
