"""What denoising starts from: noise, a picture with noise, or a picture of which a part is noise.

Random numbers are drawn in the order of diffusers' pipelines, so that a seed means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.image_model import ImageModel
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.noise import NoiseGenerator, image_noise
from fuserve.diffusion.schedulers import Scheduler
from fuserve.errors import InvalidRequestError, UnsupportedModelError

FloatArray = NDArray[np.float32]

_LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of a picture that a mask keeps."""

    mask: FloatArray  # [1, height, width, 1], 1 where the picture is made anew
    latents: FloatArray  # [images, height, width, channels]
    noise: FloatArray  # likewise

    def restore(self, sample: FloatArray, scheduler: Scheduler, index: int) -> FloatArray:
        """Put the kept part back, with the noise that there is before step ``index``."""
        kept = self.latents
        if index < len(scheduler.timesteps):
            kept = scheduler.add_noise(kept, self.noise, index).astype(np.float32, copy=False)
        return np.where(self.mask > 0.5, sample, kept)


@dataclass(frozen=True, slots=True)
class Start:
    """Latents before the first step.

    Attributes:
        latents: ``[images, height, width, channels]``.
        kept: what each step restores, for a model that was not trained to inpaint.
        beside: mask and masked picture, which an inpainting model reads beside the latents.
    """

    latents: FloatArray
    kept: Kept | None = None
    beside: FloatArray | None = None


def first_step(params: ImageParams, num_steps: int) -> int:
    """Steps that are left out because the initial image has less noise than they take away.

    Raises:
        InvalidRequestError: none would be left.
    """
    if params.init_image is None:
        return 0
    taken = min(int(num_steps * params.effective_strength), num_steps)
    if taken < 1:
        raise InvalidRequestError(
            f"strength={params.effective_strength} leaves none of {num_steps} steps: raise either."
        )
    return num_steps - taken


def begin(
    model: ImageModel[Any],
    scheduler: Scheduler,
    params: ImageParams,
    index: int,
    generators: Sequence[NoiseGenerator],
    height: int,
    width: int,
) -> Start:
    """Draw the first noise, and encode the initial image if there is one.

    Args:
        model: encodes images.
        scheduler: adds noise.
        params: the request.
        index: the first step.
        generators: one for each image.
        height: of the latents.
        width: of the latents.

    Raises:
        InvalidRequestError: an inpainting model is given no mask.
        UnsupportedModelError: a denoiser whose input channels mean something else.
    """
    channels = model.latent_channels
    inpaints = model.in_channels != channels
    if inpaints and model.in_channels != 2 * channels + 1:
        raise UnsupportedModelError(
            f"unet/config.json: in_channels={model.in_channels} is neither the latents' {channels} "
            f"nor that of an inpainting model, {2 * channels + 1}."
        )
    if inpaints and params.mask is None:
        raise InvalidRequestError("This is an inpainting model: it needs an init_image and a mask.")
    if params.init_image is None:
        noise = image_noise(generators, height, width, channels)
        return Start(noise * np.float32(scheduler.init_noise_sigma))
    image = params.init_image[None].astype(np.float32, copy=False)
    if params.mask is None:
        latents = _encode(model, image, generators)
        noise = image_noise(generators, height, width, channels)
        return Start(_noised(scheduler, latents, noise, index))
    return _begin_inpainting(
        model,
        scheduler,
        image,
        params.mask,
        params.effective_strength,
        index,
        generators,
        height,
        width,
    )


def _begin_inpainting(
    model: ImageModel[Any],
    scheduler: Scheduler,
    image: FloatArray,
    mask: FloatArray,
    strength: float,
    index: int,
    generators: Sequence[NoiseGenerator],
    height: int,
    width: int,
) -> Start:
    channels = model.latent_channels
    inpaints = model.in_channels != channels
    anew = (mask >= 0.5).astype(np.float32)  # [height, width] in pixels
    small = anew[:: model.scale_factor, :: model.scale_factor][None, :, :, None]
    all_anew = strength == 1.0
    # An inpainting model reads the picture beside the latents: it needs them only to start from.
    latents = None if inpaints and all_anew else _encode(model, image, generators)
    noise = image_noise(generators, height, width, channels)
    if all_anew or latents is None:
        sample = noise * np.float32(scheduler.init_noise_sigma)
    else:
        sample = _noised(scheduler, latents, noise, index)
    if inpaints:
        # Masked pixels are grey, the middle of the range that the encoder reads.
        masked = image + anew[None, :, :, None] * (np.float32(0.5) - image)
        beside = _encode(model, masked, generators)
        masks = np.broadcast_to(small, (len(beside), height, width, 1))
        return Start(sample, beside=np.concatenate([masks, beside], axis=3))
    # diffusers encodes the masked picture for this model too, and so draws from the generators.
    image_noise(generators, height, width, channels)
    assert latents is not None
    return Start(sample, kept=Kept(small, latents, noise))


def _noised(scheduler: Scheduler, latents: FloatArray, noise: FloatArray, index: int) -> FloatArray:
    return scheduler.add_noise(latents, noise, index).astype(np.float32, copy=False)


def _encode(
    model: ImageModel[Any], image: FloatArray, generators: Sequence[NoiseGenerator]
) -> FloatArray:
    """Draw latents of one picture, for each generator, ``[images, height, width, channels]``."""
    moments = model.encode(image)
    _, height, width, _ = moments.shape
    channels = model.latent_channels
    mean, log_variance = moments[..., :channels], moments[..., channels:]
    low, high = _LOG_VARIANCE_BOUNDS
    if float(log_variance.max()) <= low:  # an autoencoder that is not variational
        latents = np.repeat(mean, len(generators), axis=0)
    else:
        noise = image_noise(generators, height, width, channels)
        latents = mean + np.exp(0.5 * np.clip(log_variance, low, high)) * noise
    scaled: FloatArray = (latents * np.float32(model.scaling_factor)).astype(np.float32, copy=False)
    return scaled
