"""Between images and latents, whatever kind of autoencoder a model has, or none."""

from __future__ import annotations

import numpy as np

from fuserve.diffusion.banding import fit
from fuserve.diffusion.network import Backend, Network
from fuserve.diffusion.parts import VaePart
from fuserve.diffusion.program import Array
from fuserve.diffusion.vae_program import decoder_program, encoder_program
from fuserve.diffusion.vae_spec import TinyVaeSpec
from fuserve.errors import InvalidRequestError

_LOG_VARIANCE_OF_NOTHING = np.float32(-30)


class Autoencoder:
    """Decodes and encodes image by image, so that a batch takes no more memory than an image.

    Args:
        part: spec and weights; None where the denoising network paints pixels itself.
        backend: the kind of executor.
        num_programs: sizes that are kept ready.
        max_bytes: memory that decoding or encoding an image may take beside the weights, if it can
            do with as little; large images are made in bands then, to the same bits.
    """

    def __init__(
        self, part: VaePart | None, backend: Backend, num_programs: int, max_bytes: int
    ) -> None:
        self._max_bytes = max_bytes
        self._spec = None if part is None else part.spec
        self._network = None if part is None else Network(part.weights, backend, num_programs)
        self.scale_factor = 1 if part is None else part.spec.scale_factor
        """Pixels of a side over latents."""
        self.scaling_factor = 1.0 if part is None else part.spec.scaling_factor
        """What encoded images are multiplied by to have unit variance."""

    def decode(self, latents: Array) -> Array:
        """Latents, as they were denoised, to images with values from 0 to 1."""
        spec, network = self._spec, self._network
        if spec is None or network is None:
            return _unit_range(latents)
        latents = latents / np.float32(spec.scaling_factor) + np.float32(spec.shift_factor)
        is_tiny = isinstance(spec, TinyVaeSpec)
        if is_tiny:
            latents = 3 * np.tanh(latents / np.float32(3))
        _, height, width, _ = latents.shape
        images = [
            network.run(
                ("decode", height, width),
                lambda: fit(decoder_program(spec, 1, height, width), self._max_bytes),
                {"latents": row[None]},
            )["image"]
            for row in latents
        ]
        found = np.concatenate(images)
        return np.clip(found, 0, 1) if is_tiny else _unit_range(found)

    def release(self) -> None:
        """Give back the memory in which it runs."""
        if self._network is not None:
            self._network.release()

    def encode(self, images: Array) -> Array:
        """Images to means and log-variances of latents; see ``DiffusionModel.encode``."""
        _, height, width, _ = images.shape
        if height % self.scale_factor or width % self.scale_factor:
            raise InvalidRequestError(
                f"An image of {width} x {height} has a side that is no multiple of "
                f"{self.scale_factor}: resize it before."
            )
        spec, network = self._spec, self._network
        signed = images * np.float32(2) - np.float32(1)
        if spec is None or network is None:
            return _certain(signed)
        is_tiny = isinstance(spec, TinyVaeSpec)
        moments = [
            network.run(
                ("encode", height, width),
                lambda: fit(encoder_program(spec, 1, height, width), self._max_bytes),
                {"image": row[None]},
            )["moments"]
            for row in (images if is_tiny else signed)
        ]
        found = np.concatenate(moments)
        if is_tiny:
            found = _certain(found)
        found[..., : spec.latent_channels] -= np.float32(spec.shift_factor)
        return found


def _unit_range(image: Array) -> Array:
    """From [-1, 1] to [0, 1]."""
    pixels: Array = image * np.float32(0.5)
    pixels += np.float32(0.5)
    return np.clip(pixels, 0, 1, out=pixels)


def _certain(latents: Array) -> Array:
    """Moments of latents that are not drawn: as good as no variance."""
    return np.concatenate([latents, np.full_like(latents, _LOG_VARIANCE_OF_NOTHING)], axis=-1)
