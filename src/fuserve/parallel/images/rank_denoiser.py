"""A denoiser whose guided steps two halves of the ranks take together."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np

from fuserve.diffusion.image_model import Denoiser
from fuserve.diffusion.program import Array
from fuserve.diffusion.prompts import PromptEmbeds
from fuserve.diffusion.rank_executor import Gatherer
from fuserve.diffusion.step_cache import StepCache


class Binds(Protocol):
    """``DiffusionModel.denoiser``, of a rank's own model."""

    def __call__(
        self,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        timesteps: Array,
        height: int,
        width: int,
        *,
        guidance_scale: float,
        step_cache: StepCache | None,
    ) -> Denoiser:
        """Bind prompts, timesteps and a size."""
        ...


class RankDenoiser:
    """One rank's part in predicting; all ranks make the same calls.

    The first half of the ranks computes the negative prompts' predictions, the second those of the
    prompts, each as if it were alone: the layers before the first cross-attention, which are equal
    in both, too. A step without guidance is the second half's, a run without it the first's.

    Args:
        bind: makes a denoiser of this rank.
        out_channels: channels of a prediction.
        halves: this rank and the one with the same band in the other half; None: there are none.
        positive: of ``DiffusionModel.denoiser``, as the others.
        negative: likewise.
        timesteps: likewise.
        height: likewise.
        width: likewise.
        guidance_scale: likewise.
        step_cache: likewise.
    """

    def __init__(
        self,
        bind: Binds,
        out_channels: int,
        halves: Gatherer | None,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        timesteps: Array,
        height: int,
        width: int,
        guidance_scale: float,
        step_cache: StepCache | None,
    ) -> None:
        self._halves = halves if negative is not None else None
        self._is_idle = halves is not None and negative is None and halves.rank == 1
        if self._halves is not None:
            assert negative is not None
            positive, negative = (negative if self._halves.rank == 0 else positive), None
        self._out_channels = out_channels
        self._bind = partial(
            bind,
            positive,
            negative,
            timesteps,
            height,
            width,
            guidance_scale=guidance_scale,
            step_cache=step_cache,
        )
        self._own = self._bind()
        self._has_cache = step_cache is not None
        self._was_guided = True

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's denoiser."""
        return self._own.num_bytes

    def share(self, step: int, guided: bool = True) -> float:
        """Part of a full step's arithmetic that this rank would do now; 1 is all of it."""
        return self._own.share(step, guided)

    def predict(self, latents: Array, step: int, guided: bool = True) -> tuple[Array | None, Array]:
        """See ``Denoiser.predict``; in a rank that has nothing to do the predictions are empty.

        Raises:
            FuserveError: a rank does not answer.
        """
        halves = self._halves
        if self._is_idle:
            return None, np.empty(0, np.float32)
        if halves is None:
            return self._own.predict(latents, step, guided)
        shapes: list[tuple[int, ...]] = [(*latents.shape[:3], self._out_channels)] * 2
        if not guided:
            shapes[0] = (0,)
        if guided and not self._was_guided and self._has_cache:
            self._own = self._bind()  # pairs cannot take over what a step without guidance gave
        self._was_guided = guided
        parts = [np.empty(shape, np.float32) for shape in shapes]
        if guided or halves.rank == 1:
            _, parts[halves.rank] = self._own.predict(latents, step, False)
        halves.all_gather(parts)
        return (parts[0] if guided else None), parts[1]
