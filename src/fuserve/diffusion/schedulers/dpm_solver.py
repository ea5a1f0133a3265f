"""DPM-Solver++, several steps at a time: "DPM++ 2M", "DPM++ 2M Karras" and "DPM++ 2M SDE".

Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (2022),
algorithm 2 and appendix B. lambda is half the log signal-to-noise ratio, which is ``-log(sigma)``
for ``sigma``, the noise over the signal; so ``exp(-h)`` is the ratio of two sigmas.
"""

from __future__ import annotations

from collections import deque
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import LevelledNoise
from fuserve.diffusion.schedulers.noise_schedule import BETA_SCHEDULES, NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import (
    FloatArray,
    Update,
    clean_from,
    prediction_type,
)
from fuserve.diffusion.schedulers.spacing import (
    check_num_steps,
    multistep_timesteps,
    sigma_spacing,
    spaced_sigmas,
    timesteps_of,
)
from fuserve.diffusion.schedulers.variance import alpha_sigma

_FEW_STEPS = 15
"""Below so many steps the last ones are of lower order, where that is asked for."""


class DPMSolver(LevelledNoise):
    """Predicts the clean picture over the next step from the last two or three predictions.

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        fields.refuse("thresholding", "variance_type")
        algorithm = fields.choice(
            "algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis")
        )
        self._stochastic = algorithm == "sde-dpmsolver++"
        self._order = fields.integer("solver_order", 2, minimum=1)
        if self._order > (2 if self._stochastic else 3):
            raise fields.unsupported("solver_order", "1, 2 or, without SDE, 3")
        solver = fields.choice("solver_type", "midpoint", ("midpoint", "heun", "bh1", "bh2"))
        self._heun = solver == "heun"  # bh1 and bh2 are UniPC's; diffusers takes midpoint for them
        self._kind = prediction_type(fields)
        schedule = NoiseSchedule.read(fields, "trace")
        table = schedule.sigmas()
        check_num_steps(num_steps, len(table))
        self.timesteps, sigmas = _levels(fields, table, num_steps)
        ends_at_zero = fields.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero"
        last = 0.0 if ends_at_zero else table[0]
        self._sigmas: list[float] = np.array([*sigmas, last], np.float32).tolist()
        lowers = fields.flag("lower_order_final", True) and len(sigmas) < _FEW_STEPS
        self._first_order_last = lowers or ends_at_zero or fields.flag("euler_at_final", False)
        self._second_order_before_last = lowers
        self._clean: deque[FloatArray] = deque(maxlen=self._order)  # newest last

    def draws_noise(self, index: int) -> bool:
        """At every step of the stochastic form."""
        return self._stochastic

    def step(
        self,
        sample: FloatArray,
        prediction: FloatArray,
        index: int,
        noise: FloatArray | None = None,
    ) -> Update:
        """From a noise level to the next."""
        now, following = self._sigmas[index], self._sigmas[index + 1]
        (_, noise_now), (signal, noise_then) = alpha_sigma(now), alpha_sigma(following)
        clean = clean_from(self._kind, sample, prediction, *alpha_sigma(now))
        self._clean.append(clean)
        ratio = following / now  # exp(-h)
        if self._stochastic:
            assert noise is not None
            kept, weight = noise_then / noise_now * ratio, 1.0 - ratio * ratio
        else:
            kept, weight = noise_then / noise_now, 1.0 - ratio
        after = kept * sample + (signal * weight) * clean
        order = min(len(self._clean), self._allowed_order(index))
        if order == 2:
            after += signal * self._second_factor(ratio, weight) * self._slope(index)
        elif order == 3:
            after += signal * self._third(index, ratio)
        if noise is not None:
            after += (noise_then * sqrt(weight)) * noise
        return Update(after, clean)

    def _allowed_order(self, index: int) -> int:
        left = len(self._sigmas) - 1 - index
        if left == 1 and self._first_order_last:
            return 1
        if left == 2 and self._second_order_before_last:
            return 2
        return self._order

    def _second_factor(self, ratio: float, weight: float) -> float:
        """Of the slope of the clean picture over lambda, times the step."""
        if not self._heun:
            return 0.5 * weight
        h = -2.0 * log(ratio) if self._stochastic else -log(ratio)
        return 1.0 - weight / h

    def _slope(self, index: int, back: int = 0) -> FloatArray:
        """D1: the last change of the clean picture, scaled to the size of the next step."""
        h = log(self._sigmas[index] / self._sigmas[index + 1])
        before = log(self._sigmas[index - back - 1] / self._sigmas[index - back])
        return (self._clean[-1 - back] - self._clean[-2 - back]) * (h / before)

    def _third(self, index: int, ratio: float) -> FloatArray:
        """D1 and D2 of the third order, with their factors."""
        h = -log(ratio)
        r0 = log(self._sigmas[index - 1] / self._sigmas[index]) / h
        r1 = log(self._sigmas[index - 2] / self._sigmas[index - 1]) / h
        slope, before = self._slope(index), self._slope(index, 1)
        bend = (slope - before) * (1.0 / (r0 + r1))
        slope = slope + r0 * bend
        return ((ratio - 1.0) / h + 1.0) * slope - ((ratio - 1.0 + h) / h**2 - 0.5) * bend


def _levels(
    fields: SchedulerFields, table: FloatArray, num_steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Timesteps and noise levels of the steps."""
    spacing = sigma_spacing(fields)
    if spacing == "timesteps":
        # lambda_min_clipped keeps cosine schedules from starting where there is no signal.
        least = fields.number("lambda_min_clipped", -np.inf)
        last = len(table) - int(np.searchsorted(-np.log(table[::-1]), least))
        timesteps = multistep_timesteps(fields, len(table), num_steps, last)
        return timesteps, np.interp(timesteps, np.arange(len(table)), table)
    sigmas = spaced_sigmas(spacing, float(table[0]), float(table[-1]), num_steps, fields)
    timesteps = timesteps_of(sigmas, table)
    cosine = fields.choice("beta_schedule", "linear", BETA_SCHEDULES) == "squaredcos_cap_v2"
    if spacing == "karras" and not cosine:
        timesteps = np.round(timesteps)
    return np.floor(timesteps), sigmas
