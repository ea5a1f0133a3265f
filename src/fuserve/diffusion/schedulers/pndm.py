"""PNDM's linear multistep method (PLMS), the scheduler that Stable Diffusion 1 was published with.

Liu, Ren, Lin and Zhao, Pseudo Numerical Methods for Diffusion Models on Manifolds (2022).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.latents import TimedNoise
from fuserve.diffusion.schedulers.noise_schedule import NoiseSchedule
from fuserve.diffusion.schedulers.scheduler import FloatArray, Update, clean_from, noise_from
from fuserve.diffusion.schedulers.spacing import check_num_steps, whole_timesteps

_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}
"""Weights of the predictions, newest last, by how many there are."""


class PNDM(TimedNoise):
    """Adams–Bashforth of order 4 over the last predictions (eq. 12), transferred by eq. 11.

    The second timestep is visited twice: the first step is repeated with the mean of the
    predictions at its two ends, since there is no history yet.

    Raises:
        InvalidRequestError: the number of steps is out of range.
        UnsupportedModelError: a field's value.
    """

    def __init__(self, fields: SchedulerFields, num_steps: int) -> None:
        if not fields.flag("skip_prk_steps", False):
            raise fields.unsupported("skip_prk_steps", "true")
        schedule = NoiseSchedule.read(fields, "ignored")
        num_train = schedule.num_train_timesteps
        check_num_steps(num_steps, num_train)
        self._schedule = schedule
        self._kind = fields.choice("prediction_type", "epsilon", ("epsilon", "v_prediction"))
        self._final = 1.0 if fields.flag("set_alpha_to_one", False) else schedule.alphas_cumprod[0]
        visited = whole_timesteps(fields, num_train, num_steps)
        self.timesteps: NDArray[np.float64] = np.concatenate([visited[:2], visited[1:]])
        self._stride = num_train // num_steps
        self._taken = 0
        self._history: list[FloatArray] = []  # the last predictions, newest last
        self._start: FloatArray | None = None  # what the first step began from

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
        """From the timestep to the one a stride before it; the second call repeats the first."""
        timestep = int(self.timesteps[index])
        clean = clean_from(self._kind, sample, prediction, *self._schedule.alpha_sigma(timestep))
        before = timestep - self._stride
        if self._taken == 1:  # once more from where the first step began
            assert self._start is not None
            before, timestep = timestep, timestep + self._stride
            combined: FloatArray = (prediction + self._history[-1]) * 0.5
            sample, self._start = self._start, None
        else:
            self._history = [*self._history[-3:], prediction]
            combined = _adams_bashforth(self._history)
            if self._taken == 0:
                self._start = sample
        self._taken += 1
        return Update(self._transfer(sample, combined, timestep, before), clean)

    def _transfer(
        self, sample: FloatArray, prediction: FloatArray, timestep: int, before: int
    ) -> FloatArray:
        """Eq. 11, from one timestep to another."""
        alpha, sigma = self._schedule.alpha_sigma(timestep)
        product = float(self._schedule.alphas_cumprod[before] if before >= 0 else self._final)
        now = alpha * alpha
        direction = noise_from(self._kind, sample, prediction, alpha, sigma)
        divisor = now * sqrt(1.0 - product) + sqrt(now * (1.0 - now) * product)
        return sqrt(product / now) * sample - ((product - now) / divisor) * direction


def _adams_bashforth(history: list[FloatArray]) -> FloatArray:
    """The mean prediction over the next step, to the order that the history allows."""
    weights = _ADAMS_BASHFORTH[len(history)]
    combined = weights[-1] * history[-1]
    for weight, prediction in zip(weights[:-1], history[:-1], strict=True):
        combined = combined + weight * prediction
    return combined
