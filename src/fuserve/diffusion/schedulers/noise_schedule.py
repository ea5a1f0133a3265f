"""How much noise a training image had at each timestep: betas and their cumulative products.

Tables are computed in float32 where diffusers does so: timesteps are rounded from them, and would
otherwise fall on the other side now and then.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.schedulers.fields import SchedulerFields

FloatArray = NDArray[np.float32]

ZeroSNR = Literal["exact", "trace", "ignored"]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
ALMOST_ZERO_SNR = 2.0**-24
"""Stands for a last ``alphas_cumprod`` of zero where it is divided by."""


class NoiseSchedule(NamedTuple):
    """The training's noise. ``x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - ...) noise``."""

    alphas_cumprod: FloatArray  # [num_train_timesteps]

    @classmethod
    def read(cls, fields: SchedulerFields, zero_snr: ZeroSNR) -> NoiseSchedule:
        """From the fields ``beta_*``, ``trained_betas`` and ``rescale_betas_zero_snr``.

        Args:
            fields: the config.
            zero_snr: whether the last of ``rescale_betas_zero_snr`` is "exact", with a "trace" of
                signal, for schedulers that divide by it, or the field is "ignored".
        """
        betas = _betas(fields)
        rescaled = zero_snr != "ignored" and fields.flag("rescale_betas_zero_snr", False)
        if rescaled:
            betas = _rescale_to_zero_snr(betas)
        alphas_cumprod = _cumprod(np.float32(1.0) - betas)
        if rescaled and zero_snr == "trace":
            alphas_cumprod[-1] = ALMOST_ZERO_SNR
        return cls(alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the training."""
        return len(self.alphas_cumprod)

    def sigmas(self) -> FloatArray:
        """Noise over signal at each timestep, ``[num_train_timesteps]``, growing."""
        one = np.float32(1.0)
        variance: FloatArray = (one - self.alphas_cumprod) / self.alphas_cumprod
        return np.sqrt(variance)

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """Factors of image and noise at a timestep; their squares sum to 1."""
        product = float(self.alphas_cumprod[timestep])
        return math.sqrt(product), math.sqrt(1.0 - product)


def _betas(fields: SchedulerFields) -> FloatArray:
    """Variance added at each timestep, ``[num_train_timesteps]``."""
    trained = fields.numbers("trained_betas")
    if trained is not None:
        return np.array(trained, np.float32)
    count = fields.integer("num_train_timesteps", 1000, minimum=1)
    start, end = fields.number("beta_start", 0.0001), fields.number("beta_end", 0.02)
    kind = fields.choice("beta_schedule", "linear", BETA_SCHEDULES)
    if kind == "linear":
        return np.linspace(start, end, count, dtype=np.float32)
    if kind == "scaled_linear":  # of latent diffusion: linear in the standard deviation
        deviations = np.linspace(start**0.5, end**0.5, count, dtype=np.float32)
        return deviations * deviations
    return _cosine_betas(count)


def _cosine_betas(count: int, largest: float = 0.999) -> FloatArray:
    """Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021), eq. 17."""
    time = np.arange(count + 1) / count
    signal = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: FloatArray = np.minimum(1.0 - signal[1:] / signal[:-1], largest).astype(np.float32)
    return betas


def _rescale_to_zero_snr(betas: FloatArray) -> FloatArray:
    """Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed (2023), alg. 1."""
    signal = np.sqrt(_cumprod(np.float32(1.0) - betas))
    first, last = signal[0], signal[-1]
    shifted: FloatArray = (signal - last) * (first / (first - last))
    product = shifted * shifted
    alphas: FloatArray = np.concatenate([product[:1], product[1:] / product[:-1]])
    return np.float32(1.0) - alphas


def _cumprod(factors: FloatArray) -> FloatArray:
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)
