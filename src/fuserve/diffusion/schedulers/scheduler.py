"""What the generation loop asks of a scheduler, and what a prediction says."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields

FloatArray = NDArray[np.floating]
"""float32 everywhere; numpy's types lose that in products with numbers."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Update(NamedTuple):
    """A step's result."""

    sample: FloatArray
    """The latents with less noise, ``[images, height, width, channels]``."""
    clean: FloatArray
    """What the model takes the picture to be, for previews."""


class Scheduler(Protocol):
    """The steps of one request; holds the predictions that the next steps need.

    Steps are taken in order, from any index on. Arrays may have any shape: all is elementwise.
    """

    timesteps: NDArray[np.float64]
    """What the model is told at each step, falling, ``[steps]``; not whole with every scheduler."""
    init_noise_sigma: float
    """Factor of the unit noise that a picture starts from."""

    def draws_noise(self, index: int) -> bool:
        """Whether the step adds fresh noise."""
        ...

    def scale_input(self, sample: FloatArray, index: int) -> FloatArray:
        """The latents as the model shall see them."""
        ...

    def add_noise(self, clean: FloatArray, noise: FloatArray, index: int) -> FloatArray:
        """A clean picture with the noise that there is before a step."""
        ...

    def step(
        self,
        sample: FloatArray,
        prediction: FloatArray,
        index: int,
        noise: FloatArray | None = None,
    ) -> Update:
        """Take one step.

        Args:
            sample: the latents before it.
            prediction: what the model says of them, after guidance.
            index: which step.
            noise: unit noise, where ``draws_noise``.
        """
        ...


def prediction_type(fields: SchedulerFields) -> str:
    """What the model predicts: the noise, the velocity, or the clean picture."""
    return fields.choice("prediction_type", "epsilon", PREDICTION_TYPES)


def clean_from(
    kind: str, sample: FloatArray, prediction: FloatArray, alpha: float, sigma: float
) -> FloatArray:
    """The clean picture, given ``sample = alpha * clean + sigma * noise``.

    The velocity is ``alpha * noise - sigma * clean``: Salimans and Ho, Progressive Distillation for
    Fast Sampling of Diffusion Models (2022), appendix D.
    """
    if kind == "epsilon":
        return (sample - sigma * prediction) * (1.0 / alpha)
    if kind == "v_prediction":
        return alpha * sample - sigma * prediction
    return prediction


def noise_from(
    kind: str, sample: FloatArray, prediction: FloatArray, alpha: float, sigma: float
) -> FloatArray:
    """The noise, given ``sample = alpha * clean + sigma * noise``."""
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return alpha * prediction + sigma * sample
    return (sample - alpha * prediction) * (1.0 / sigma)
