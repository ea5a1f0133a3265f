"""Which of the training's timesteps a run visits, and which noise levels.

Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed (2023), table 2, for the
spacings; Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022),
eq. 5, for sigmas that are denser where there is little noise.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.errors import InvalidRequestError, UnsupportedModelError

FloatArray = NDArray[np.float64]
SigmaSpacing = Literal["timesteps", "karras", "exponential"]

SPACINGS = ("leading", "trailing", "linspace")
_RHO = 7.0


def check_num_steps(num_steps: int, num_train_timesteps: int) -> None:
    """Refuse what cannot be spaced.

    Raises:
        InvalidRequestError: no step, or more than the model was trained on.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise InvalidRequestError(
            f"steps={num_steps}: the model has {num_train_timesteps} timesteps, of which at least "
            "one and at most all can be visited."
        )


def leading(num_train: int, num_steps: int, offset: int) -> FloatArray:
    """Every k-th timestep from 0, falling, all raised by the offset."""
    return np.arange(num_steps, dtype=np.float64)[::-1] * (num_train // num_steps) + offset


def trailing(num_train: int, num_steps: int) -> FloatArray:
    """Every k-th timestep back from the last, falling. k need not be whole."""
    timesteps: FloatArray = np.round(np.arange(num_train, 0, -num_train / num_steps)) - 1.0
    return timesteps


def linspace(num_train: int, num_steps: int) -> FloatArray:
    """From the last timestep to the first, evenly; not rounded."""
    return np.linspace(0.0, num_train - 1.0, num_steps)[::-1]


def whole_timesteps(fields: SchedulerFields, num_train: int, num_steps: int) -> FloatArray:
    """As the config spaces them, rounded.

    Raises:
        InvalidRequestError: with its offset the first one would be beyond the training's last.
    """
    spacing = fields.choice("timestep_spacing", "leading", SPACINGS)
    if spacing == "leading":
        offset = fields.integer("steps_offset", 0)
        timesteps = leading(num_train, num_steps, offset)
        if timesteps[0] >= num_train:
            raise InvalidRequestError(
                f"steps={num_steps} with the model's steps_offset of {offset} begins beyond its "
                f"last timestep, {num_train - 1}; take fewer steps."
            )
        return timesteps
    if spacing == "trailing":
        return trailing(num_train, num_steps)
    return np.round(linspace(num_train, num_steps))


def multistep_timesteps(
    fields: SchedulerFields, num_train: int, num_steps: int, last: int
) -> FloatArray:
    """As the multistep solvers space them: as if there were a step more, down to the first.

    Args:
        fields: the config.
        num_train: timesteps of the training.
        num_steps: steps to take.
        last: one more than the first timestep that may be visited.

    Raises:
        InvalidRequestError: "leading" has no room for so many.
    """
    spacing = fields.choice("timestep_spacing", "linspace", SPACINGS)
    if spacing == "linspace":
        return np.round(np.linspace(0.0, last - 1.0, num_steps + 1))[:0:-1]
    if spacing == "leading":
        offset = fields.integer("steps_offset", 0)
        return leading(last, num_steps + 1, offset)[:-1]
    return np.round(np.arange(last, 0, -num_train / num_steps)) - 1.0


def sigma_spacing(fields: SchedulerFields) -> SigmaSpacing:
    """How the noise levels are chosen, from the fields ``use_*_sigmas``.

    Raises:
        UnsupportedModelError: two are asked for, or one that is not known.
    """
    fields.refuse("use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "use_dynamic_shifting")
    karras = fields.flag("use_karras_sigmas", False)
    exponential = fields.flag("use_exponential_sigmas", False)
    if karras and exponential:
        raise UnsupportedModelError(
            "scheduler_config.json: use_karras_sigmas and use_exponential_sigmas exclude another."
        )
    return "karras" if karras else "exponential" if exponential else "timesteps"


def spaced_sigmas(
    spacing: SigmaSpacing, low: float, high: float, num_steps: int, fields: SchedulerFields
) -> FloatArray:
    """Noise levels by a formula, falling, ``[num_steps]``.

    Args:
        spacing: "karras" or "exponential".
        low: the least, unless the field ``sigma_min`` says otherwise.
        high: the greatest, unless the field ``sigma_max`` says otherwise.
        num_steps: how many.
        fields: the config.
    """
    least, greatest = fields.optional_number("sigma_min"), fields.optional_number("sigma_max")
    low = low if least is None else least
    high = high if greatest is None else greatest
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(high), np.log(low), num_steps))
    ramp = np.linspace(0.0, 1.0, num_steps)
    root_high, root_low = high ** (1.0 / _RHO), low ** (1.0 / _RHO)
    sigmas: FloatArray = (root_high + ramp * (root_low - root_high)) ** _RHO
    return sigmas


def timesteps_of(sigmas: FloatArray, table: NDArray[np.float32]) -> FloatArray:
    """Where noise levels lie among the timesteps, between two of them by the logarithm.

    Args:
        sigmas: noise levels.
        table: the level of each timestep, growing, ``[num_train_timesteps]``.
    """
    logarithms = np.log(table)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    return np.interp(wanted, logarithms, np.arange(len(table), dtype=np.float64))
