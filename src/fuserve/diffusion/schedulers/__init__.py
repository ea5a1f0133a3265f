"""Schedulers: from a ``scheduler_config.json`` to the steps of one request, over numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fuserve.diffusion.schedulers.ddim import DDIM
from fuserve.diffusion.schedulers.dpm_solver import DPMSolver
from fuserve.diffusion.schedulers.euler import Euler, EulerAncestral
from fuserve.diffusion.schedulers.fields import SchedulerFields
from fuserve.diffusion.schedulers.lcm import LCM
from fuserve.diffusion.schedulers.pndm import PNDM
from fuserve.diffusion.schedulers.scheduler import Scheduler, Update
from fuserve.diffusion.schedulers.unipc import UniPC
from fuserve.errors import InvalidRequestError, UnsupportedModelError

__all__ = [
    "SCHEDULER_NAMES",
    "Scheduler",
    "Update",
    "check_name",
    "is_few_step",
    "make_scheduler",
    "sampler_name",
]

_CLASSES: dict[str, Callable[[SchedulerFields, int], Scheduler]] = {
    "DDIMScheduler": DDIM,
    "PNDMScheduler": PNDM,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "DPMSolverMultistepScheduler": DPMSolver,
    "UniPCMultistepScheduler": UniPC,
    "LCMScheduler": LCM,
}

_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
}

_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False}
_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_2M_SDE = {**_2M, "algorithm_type": "sde-dpmsolver++"}

_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", _PLAIN),
    "euler-karras": ("EulerDiscreteScheduler", _KARRAS),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {**_2M, **_PLAIN}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {**_2M, **_KARRAS}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {**_2M_SDE, **_PLAIN}),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", {**_2M_SDE, **_KARRAS}),
    "unipc": ("UniPCMultistepScheduler", _PLAIN),
    "lcm": ("LCMScheduler", {}),
}

SCHEDULER_NAMES = tuple(_NAMED)
"""What a user can choose from; diffusers' class names are understood too."""


def make_scheduler(config: Mapping[str, Any], num_steps: int, name: str | None = None) -> Scheduler:
    """The scheduler of one request.

    Args:
        config: the model's ``scheduler_config.json``.
        num_steps: denoising steps.
        name: one of ``SCHEDULER_NAMES`` or a class name of diffusers, to be used instead of the
            config's own class with what the config says of the training; None takes its own.

    Raises:
        InvalidRequestError: an unknown name, or a number of steps out of range.
        UnsupportedModelError: the config's class, or the value of one of its fields.
    """
    class_name, fields = _chosen(config, name)
    return _CLASSES[class_name](SchedulerFields(fields, class_name), num_steps)


def is_few_step(config: Mapping[str, Any], name: str | None = None) -> bool:
    """Whether the scheduler is made for distilled models, which need a handful of steps."""
    return _chosen(config, name)[0] == "LCMScheduler"


def sampler_name(config: Mapping[str, Any], name: str | None = None) -> str:
    """What Stable Diffusion's tools call the scheduler, such as "DPM++ 2M SDE Karras"."""
    class_name, fields = _chosen(config, name)
    words = [_SAMPLERS[class_name]]
    if fields.get("algorithm_type") == "sde-dpmsolver++":
        words.append("SDE")
    if fields.get("use_karras_sigmas"):
        words.append("Karras")
    return " ".join(words)


def check_name(name: str | None) -> None:
    """Refuse a name that no model could take.

    Raises:
        InvalidRequestError: it is unknown.
    """
    if name is not None and name not in _NAMED and name not in _CLASSES:
        raise InvalidRequestError(
            f"scheduler={name!r} is unknown. Choose one of: {', '.join(SCHEDULER_NAMES)}."
        )


def _chosen(config: Mapping[str, Any], name: str | None) -> tuple[str, dict[str, Any]]:
    """The class, and its fields."""
    check_name(name)
    if name is None:
        own = config.get("_class_name")
        if own not in _CLASSES:
            raise UnsupportedModelError(
                f"scheduler_config.json: _class_name={own!r} is not supported. Choose another "
                f"scheduler: {', '.join(SCHEDULER_NAMES)}."
            )
        return str(own), dict(config)
    if name in _CLASSES:
        return name, dict(config)
    class_name, overrides = _NAMED[name]
    return class_name, {**config, **overrides}
