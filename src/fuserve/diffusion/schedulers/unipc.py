"""UniPC: Zhao, Bai, Rao, Zhou and Lu, A Unified Predictor-Corrector Framework for Fast Sampling of
Diffusion Models (2023).
"""

from __future__ import annotations

from collections import deque
from math import expm1, log

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import LevelledNoise
from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
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


class UniPC(LevelledNoise):
    """Corrects each step by the prediction at its end, then predicts the next (algorithm 1 and 2).

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        fields.refuse("thresholding", "solver_p", "shift_terminal")
        if not fields.flag("predict_x0", True):
            raise fields.unsupported("predict_x0", "true")
        if not fields.flag("lower_order_final", True):
            raise fields.unsupported("lower_order_final", "true")
        self._order = fields.integer("solver_order", 2, minimum=1)
        # The other types are DPM-Solver's; diffusers takes bh2 for them.
        solver = fields.choice("solver_type", "bh2", ("bh1", "bh2", "midpoint", "heun"))
        self._is_bh1 = solver == "bh1"
        self._uncorrected = {int(one) for one in fields.numbers("disable_corrector") or []}
        self._kind = prediction_type(fields)
        table = NoiseSchedule.read(fields, "trace").sigmas()
        check_num_steps(num_steps, len(table))
        self.timesteps, self._sigmas = _levels(fields, table, num_steps)
        self._clean: deque[FloatArray] = deque(maxlen=self._order)  # newest last
        self._last: FloatArray | None = None  # what the last step began from
        self._last_order = 0

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
        """Correct the step that led here, and go to the next noise level."""
        clean = clean_from(self._kind, sample, prediction, *alpha_sigma(self._sigmas[index]))
        if self._last is not None and index - 1 not in self._uncorrected:
            sample = self._correct(self._last, clean, index - 1, self._last_order)
        self._clean.append(clean)
        order = min(len(self._clean), len(self._sigmas) - 1 - index)
        self._last, self._last_order = sample, order
        return Update(self._predict(sample, index, order), clean)

    def _predict(self, sample: FloatArray, index: int, order: int) -> FloatArray:
        """UniP: the step from noise level ``index`` to the next."""
        after, signal = self._first_order(sample, index)
        if order == 1:
            return after
        ratios, changes = self._changes(index, order)
        matrix, vector, scale = self._system(index, ratios)
        # Of order 2 the paper takes one half, which is near enough to the solution.
        weights = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], vector[:-1])
        for weight, change in zip(weights, changes, strict=True):
            after -= (signal * scale * float(weight)) * change
        return after

    def _correct(self, start: FloatArray, clean: FloatArray, index: int, order: int) -> FloatArray:
        """UniC: the step from noise level ``index`` again, knowing the prediction at its end."""
        after, signal = self._first_order(start, index)
        ratios, changes = self._changes(index, order)
        matrix, vector, scale = self._system(index, ratios)
        weights = [0.5] if order == 1 else np.linalg.solve(matrix, vector)
        for weight, change in zip(weights, [*changes, clean - self._clean[-1]], strict=True):
            after -= (signal * scale * float(weight)) * change
        return after

    def _first_order(self, sample: FloatArray, index: int) -> tuple[FloatArray, float]:
        """The step with the last prediction alone, and the factor of the picture at its end."""
        now, following = self._sigmas[index], self._sigmas[index + 1]
        (_, noise_now), (signal, noise_then) = alpha_sigma(now), alpha_sigma(following)
        weight = 1.0 - following / now
        return noise_then / noise_now * sample + (signal * weight) * self._clean[-1], signal

    def _changes(self, index: int, order: int) -> tuple[list[float], list[FloatArray]]:
        """Distances in lambda to the predictions before, over the step, and changes over them."""
        now = self._sigmas[index]
        h = log(now / self._sigmas[index + 1])
        ratios = [log(now / self._sigmas[index - i]) / h for i in range(1, order)]
        changes: list[FloatArray] = [
            (self._clean[-1 - i] - self._clean[-1]) * (1.0 / ratio)
            for i, ratio in enumerate(ratios, start=1)
        ]
        return ratios, changes

    def _system(
        self, index: int, ratios: list[float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """R and b of eq. 9, and B(h)."""
        h = -log(self._sigmas[index] / self._sigmas[index + 1])
        scale = h if self._is_bh1 else expm1(h)
        nodes = np.array([*ratios, 1.0])
        matrix = np.stack([nodes**power for power in range(len(nodes))])
        phi, factorial, vector = expm1(h) / h - 1.0, 1, []
        for i in range(1, len(nodes) + 1):
            vector.append(phi * factorial / scale)
            factorial *= i + 1
            phi = phi / h - 1.0 / factorial
        return matrix, np.array(vector), scale


def _levels(
    fields: SchedulerFields, table: FloatArray, num_steps: int
) -> tuple[NDArray[np.float64], list[float]]:
    """Timesteps and noise levels of the steps, the latter with the one they end at."""
    spacing = sigma_spacing(fields)
    if spacing == "timesteps":
        timesteps = multistep_timesteps(fields, len(table), num_steps, len(table))
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        least = float(table[0])
    else:
        sigmas = spaced_sigmas(spacing, float(table[0]), float(table[-1]), num_steps, fields)
        timesteps = timesteps_of(sigmas, table)
        timesteps = np.round(timesteps) if spacing == "karras" else np.floor(timesteps)
        least = float(sigmas[-1])
    ends_at_zero = fields.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero"
    values: list[float] = np.array([*sigmas, 0.0 if ends_at_zero else least], np.float32).tolist()
    return timesteps, values
