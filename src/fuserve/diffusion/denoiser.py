"""The denoising network bound to prompts, a schedule and a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fuserve.diffusion.network import Network
from fuserve.diffusion.program import Array, Program
from fuserve.diffusion.step_cache import CachedFeature, StepCache, shallow_share
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import UNetSpec
from fuserve.errors import InvalidRequestError

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
        step_cache: which steps reuse the deep part of the network; None: every step is full.
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
        step_cache: StepCache | None = None,
    ) -> None:
        self._spec, self._network, self._times = spec, network, times
        self._positive, self._negative = positive, negative
        self._size = height, width
        self._stacked: dict[tuple[int, bool], dict[str, Array]] = {}
        self._cached = None if step_cache is None else CachedFeature(step_cache)

    @property
    def num_bytes(self) -> int:
        """Its own memory: the times, the rows of text side by side, the cached feature."""
        text = sum(array.nbytes for rows in self._stacked.values() for array in rows.values())
        cached = 0 if self._cached is None else self._cached.num_bytes
        return self._times.nbytes + text + cached

    def share(self, step: int, guided: bool = True) -> float:
        """Part of a full step's arithmetic that ``predict`` would do now; 1 is all of it."""
        cached = self._cached
        if cached is None or not cached.serves(step, guided and self._negative is not None):
            return 1.0
        tokens = next(iter(self._positive[0].values())).shape[2]
        return shallow_share(self._spec, *self._size, tokens, cached.branch)

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

        Raises:
            InvalidRequestError: the latents are not of the size, or not as many, as was said.
        """
        guided = guided and self._negative is not None
        images, (height, width) = len(latents), self._size
        wanted = (height, width, self._spec.in_channels)
        if latents.shape[1:] != wanted or images < 1 or images % len(self._positive):
            raise InvalidRequestError(
                f"The latents are {list(latents.shape)}; wanted are {list(wanted)} of as many "
                f"images as prompts, {len(self._positive)}, or a multiple."
            )
        text = self._text(images, guided)
        times = self._time_rows(step, images, guided)
        inputs = {"latents": latents, "time": times[:, None, None], **text}
        rows, tokens = next(iter(text.values())).shape[0:3:2]
        sizes, sequences = (images, rows, height, width), (tokens, len(times))
        prediction = self._run(inputs, sizes, sequences, step, guided)
        if not guided:
            return None, prediction
        pairs = prediction.reshape(images, 2, height, width, -1)
        return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])

    def _run(
        self,
        inputs: dict[str, Array],
        sizes: tuple[int, int, int, int],
        sequences: tuple[int, int],
        step: int,
        guided: bool,
    ) -> Array:
        """The prediction of the full program, or of the one that takes over the feature."""
        cached, (tokens, time_rows) = self._cached, sequences
        if cached is None:
            branch = feature = None
        else:
            branch, feature = cached.branch, cached.at(step, sizes[0], guided)
        if feature is not None:
            inputs = {**inputs, "feature": feature}

        def build() -> Program:
            return unet_program(
                self._spec,
                *sizes,
                tokens=tokens,
                time_rows=time_rows,
                cache_branch=branch,
                is_shallow=feature is not None,
            )

        key = (*sizes, *sequences, branch, feature is not None)
        outputs = self._network.run(key, build, inputs)
        if cached is not None and feature is None:
            cached.keep(outputs["feature"], step, guided)
        return outputs["prediction"]

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
