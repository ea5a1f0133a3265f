"""Euler steps on the noise level, and their ancestral form.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), algorithm
2 without churn. Latents are ``clean + sigma * noise`` here, so they are scaled for the model.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import AddedNoise
from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import FloatArray, Update, prediction_type
from fuserve.diffusion.schedulers.spacing import (
    SPACINGS,
    check_num_steps,
    leading,
    linspace,
    sigma_spacing,
    spaced_sigmas,
    timesteps_of,
    trailing,
)


class Euler(AddedNoise):
    """One evaluation a step, along the tangent.

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        fields.choice("timestep_type", "discrete", ("discrete",))
        schedule = NoiseSchedule.read(fields, "trace")
        check_num_steps(num_steps, schedule.num_train_timesteps)
        self._kind = prediction_type(fields)
        table = schedule.sigmas()
        timesteps, starts_at_most_noise = _timesteps(fields, len(table), num_steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if fields.choice("interpolation_type", "linear", ("linear", "log_linear")) == "log_linear":
            sigmas = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), num_steps + 1))
        spacing = sigma_spacing(fields)
        if spacing != "timesteps":
            sigmas = spaced_sigmas(spacing, sigmas[-1], sigmas[0], num_steps, fields)
            timesteps = timesteps_of(sigmas, table)
        least = fields.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min"
        self.timesteps = timesteps
        self._sigmas = _rounded([*sigmas, table[0] if least else 0.0])
        self.init_noise_sigma = _initial(self._sigmas, starts_at_most_noise)

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
        """From a noise level to the next."""
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = _clean(self._kind, sample, prediction, sigma)
        return Update(_towards(clean, sample, following / sigma), clean)


class EulerAncestral(AddedNoise):
    """Steps beyond the next noise level and adds fresh noise up to it (k-diffusion's form).

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        schedule = NoiseSchedule.read(fields, "trace")
        check_num_steps(num_steps, schedule.num_train_timesteps)
        self._kind = fields.choice("prediction_type", "epsilon", ("epsilon", "v_prediction"))
        table = schedule.sigmas()
        self.timesteps, starts_at_most_noise = _timesteps(fields, len(table), num_steps)
        sigmas = np.interp(self.timesteps, np.arange(len(table)), table)
        self._sigmas = _rounded([*sigmas, 0.0])
        self.init_noise_sigma = _initial(self._sigmas, starts_at_most_noise)

    def draws_noise(self, index: int) -> bool:
        """At every step; the last adds none of it, but diffusers draws there too."""
        return True

    def step(
        self,
        sample: FloatArray,
        prediction: FloatArray,
        index: int,
        noise: FloatArray | None = None,
    ) -> Update:
        """From a noise level to the next, part of the way by fresh noise."""
        assert noise is not None
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = _clean(self._kind, sample, prediction, sigma)
        up = sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
        down = sqrt(following**2 - up**2)
        return Update(_towards(clean, sample, down / sigma) + up * noise, clean)


def _timesteps(
    fields: SchedulerFields, num_train: int, num_steps: int
) -> tuple[NDArray[np.float64], bool]:
    """The timesteps visited, and whether the first is the noisiest."""
    spacing = fields.choice("timestep_spacing", "linspace", SPACINGS)
    if spacing == "leading":
        return leading(num_train, num_steps, fields.integer("steps_offset", 0)), False
    if spacing == "trailing":
        return trailing(num_train, num_steps), True
    return linspace(num_train, num_steps).astype(np.float32).astype(np.float64), True


def _rounded(sigmas: list[float]) -> list[float]:
    """To float32, as diffusers keeps them."""
    values: list[float] = np.array(sigmas, np.float32).tolist()
    return values


def _initial(sigmas: list[float], starts_at_most_noise: bool) -> float:
    """The standard deviation of the first latents."""
    greatest = max(sigmas)
    return greatest if starts_at_most_noise else sqrt(greatest**2 + 1.0)


def _clean(kind: str, sample: FloatArray, prediction: FloatArray, sigma: float) -> FloatArray:
    """The clean picture, given ``sample = clean + sigma * noise``."""
    if kind == "epsilon":
        return sample - sigma * prediction
    if kind == "v_prediction":
        variance = sigma**2 + 1.0
        return sample * (1.0 / variance) - (sigma / sqrt(variance)) * prediction
    return prediction


def _towards(clean: FloatArray, sample: FloatArray, kept: float) -> FloatArray:
    """Along the tangent, until this share of the noise is left."""
    return clean + kept * (sample - clean)
