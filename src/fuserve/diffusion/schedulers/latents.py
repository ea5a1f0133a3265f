"""What the latents between the steps are: the two forms in which schedulers hold their noise."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import FloatArray


class MixedLatents:
    """``alpha * clean + sigma * noise``, of variance 1, as the model takes them."""

    init_noise_sigma: float = 1.0
    timesteps: NDArray[np.float64]
    _schedule: NoiseSchedule

    def scale_input(self, sample: FloatArray, index: int) -> FloatArray:
        """The latents themselves."""
        return sample

    def add_noise(self, clean: FloatArray, noise: FloatArray, index: int) -> FloatArray:
        """A clean picture with the noise that there is before a step."""
        alpha, sigma = self._schedule.alpha_sigma(int(self.timesteps[index]))
        return alpha * clean + sigma * noise


class AddedNoise:
    """``clean + sigma * noise``, which the model takes divided by its deviation."""

    _sigmas: list[float]

    def scale_input(self, sample: FloatArray, index: int) -> FloatArray:
        """The latents with the variance that the model was trained on."""
        return sample * (1.0 / sqrt(self._sigmas[index] ** 2 + 1.0))

    def add_noise(self, clean: FloatArray, noise: FloatArray, index: int) -> FloatArray:
        """A clean picture with the noise that there is before a step."""
        return clean + self._sigmas[index] * noise
