"""The denoising network bound to prompts, a schedule and a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fuserve.diffusion.network import Network
from fuserve.diffusion.program import Array
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import UNetSpec

TextStates = Mapping[str, Array]
"""Keys and values of a prompt for each cross-attention, by the name of the program's input."""


class Denoiser:
    """Predicts from latents; all that does not depend on them has been computed before.

    Args:
        spec: the network.
        network: runs its programs.
        positive: the positive prompts' keys and values, ``[1, 1, tokens, 2 * channels]`` each.
        negative: the negative prompts', as many, or None without guidance.
        times: what the residual blocks add at each step, ``[steps, rows, channels]``: one row for
            all, or one for each row of text, [negative, positive] of each prompt.
        height: of the latents.
        width: of the latents.
    """

    def __init__(
        self,
        spec: UNetSpec,
        network: Network,
        positive: Sequence[TextStates],
        negative: Sequence[TextStates] | None,
        times: Array,
        height: int,
        width: int,
    ) -> None:
        self._spec, self._network, self._times = spec, network, times
        self._positive, self._negative = positive, negative
        self._size = height, width
        self._stacked: dict[tuple[int, bool], dict[str, Array]] = {}

    def predict(self, latents: Array, step: int, guided: bool = True) -> tuple[Array | None, Array]:
        """Predictions for the negative and the positive prompts.

        Args:
            latents: ``[images, height, width, in_channels]``, as the scheduler scales them; images
                are as many as prompts or a multiple, consecutive ones for each prompt.
            step: index into the timesteps.
            guided: False computes the positive ones alone.

        Returns:
            Negative predictions, None where they were not computed, and positive ones
            # [images, height, width, out_channels]. They are the caller's.
        """
        guided = guided and self._negative is not None
        images, (height, width) = len(latents), self._size
        text = self._text(images, guided)
        times = self._time_rows(step, images, guided)
        rows, tokens = next(iter(text.values())).shape[0:3:2]
        inputs = {"latents": latents, "time": times[:, None, None], **text}
        prediction = self._network.run(
            (images, rows, height, width, tokens, len(times)),
            lambda: unet_program(
                self._spec, images, rows, height, width, tokens=tokens, time_rows=len(times)
            ),
            inputs,
        )["prediction"]
        if not guided:
            return None, prediction
        pairs = prediction.reshape(images, 2, height, width, -1)
        return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])

    def _text(self, images: int, guided: bool) -> dict[str, Array]:
        """One row of text for each row of the network."""
        if (images, guided) not in self._stacked:
            repeats = images // len(self._positive)
            rows: list[TextStates] = []
            for index, positive in enumerate(self._positive):
                pair = (
                    [self._negative[index], positive] if guided and self._negative else [positive]
                )
                rows += pair * repeats
            stacked = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            self._stacked[images, guided] = stacked
        return self._stacked[images, guided]

    def _time_rows(self, step: int, images: int, guided: bool) -> Array:
        """One row for all, or one for each row of text  # [rows, channels]."""
        times: Array = self._times[step]
        if len(times) == 1:
            return times
        pairs = times.reshape(len(self._positive), -1, times.shape[-1])
        pairs = np.repeat(pairs, images // len(self._positive), axis=0)
        if not guided:
            pairs = pairs[:, -1:]
        return np.ascontiguousarray(pairs).reshape(-1, times.shape[-1])
