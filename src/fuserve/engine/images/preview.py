"""Previews: what latents will look like, for almost nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fuserve.engine.images.model import ServedModel

FloatArray = NDArray[np.float32]

_SAMPLE_SIDE = 16
_CHEAP_FACTOR = 2
_SEED = 0


class Previews:
    """Pictures of latents, a pixel for each place.

    Colours are close to a linear function of the latents. It is fitted to the model's own decoder
    once, on a small sample, so that it suits any autoencoder; decoding in full would cost more
    than a denoising step. Models without an autoencoder, or nearly so, are decoded.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._colours: FloatArray | None = None  # [channels + 1, 3]

    def picture(self, latents: FloatArray) -> FloatArray:
        """A picture ``[height, width, 3]``, from 0 to 1, of latents ``[height, width, channels]``.

        Height and width are those of the latents, or of the decoded picture.
        """
        if self._model.scale_factor <= _CHEAP_FACTOR:
            decoded: FloatArray = self._model.decode(latents[None])[0]
            return decoded
        if self._colours is None:
            self._colours = self._fit()
        colours = latents @ self._colours[:-1] + self._colours[-1]
        shown: FloatArray = np.clip(colours, 0.0, 1.0)
        return shown

    def _fit(self) -> FloatArray:
        """Least squares over a decoded sample of smooth latents of unit variance."""
        channels, factor = self._model.latent_channels, self._model.scale_factor
        drawn = np.random.default_rng(_SEED).standard_normal(
            (_SAMPLE_SIDE // 2, _SAMPLE_SIDE // 2, channels)
        )
        latents = drawn.repeat(2, axis=0).repeat(2, axis=1).astype(np.float32)
        image = self._model.decode(latents[None])[0]
        shape = (_SAMPLE_SIDE, factor, _SAMPLE_SIDE, factor, 3)
        seen = image.reshape(shape).mean(axis=(1, 3)).reshape(-1, 3)
        inputs = np.concatenate(
            [latents.reshape(-1, channels), np.ones((_SAMPLE_SIDE**2, 1), np.float32)], axis=1
        )
        fitted: FloatArray = np.linalg.lstsq(inputs, seen, rcond=None)[0].astype(np.float32)
        return fitted
