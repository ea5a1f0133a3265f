"""What the latents between the steps are: the forms in which schedulers hold their noise."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import FloatArray
from fuserve.diffusion.schedulers.variance import alpha_sigma


class _UnitVariance:
    """``alpha * clean + sigma * noise`` with squares that sum to 1, as the model takes them."""

    init_noise_sigma: float = 1.0

    def scale_input(self, sample: FloatArray, index: int) -> FloatArray:
        """The latents themselves."""
        return sample


class TimedNoise(_UnitVariance):
    """Of unit variance, the noise being that of the training's timesteps."""

    timesteps: NDArray[np.float64]
    _schedule: NoiseSchedule

    def add_noise(self, clean: FloatArray, noise: FloatArray, index: int) -> FloatArray:
        """A clean picture with the noise that there is before a step."""
        alpha, sigma = self._schedule.alpha_sigma(int(self.timesteps[index]))
        return alpha * clean + sigma * noise


class LevelledNoise(_UnitVariance):
    """Of unit variance, the noise being given by its ratio to the picture."""

    _sigmas: list[float]

    def add_noise(self, clean: FloatArray, noise: FloatArray, index: int) -> FloatArray:
        """A clean picture with the noise that there is before a step."""
        alpha, sigma = alpha_sigma(self._sigmas[index])
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
