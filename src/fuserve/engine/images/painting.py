"""Painting: the pictures of one request on their way."""

from __future__ import annotations

import math

from fuserve.diffusion.pipeline import ImageTask
from fuserve.engine.images.model import ServedModel
from fuserve.engine.images.preview import Previews
from fuserve.engine.images.request import FloatArray, ImageRequest, ImageUpdate
from fuserve.engine.images.stats import StepKind

_DECODE_FORWARDS = 3
"""A decode costs as much as this many forwards of the denoiser (SD 1.5 at 512 x 512: 3.2)."""


class Painting:
    """One picture after the other, a step at a time.

    Several at once would gain little on a CPU, and each step would keep the others waiting longer.

    Args:
        model: what paints.
        request: what is wanted.
        previews: makes its previews.
    """

    def __init__(self, model: ServedModel, request: ImageRequest, previews: Previews) -> None:
        self.request = request
        self._model = model
        self._previews = previews
        self._index = 0
        self._task = self._new_task()
        self.num_latents = 0

    @property
    def num_images(self) -> int:
        """Pictures that are finished."""
        return self._index

    @property
    def is_done(self) -> bool:
        """All pictures are finished."""
        return self._index == len(self.request.seeds)

    @property
    def kind(self) -> StepKind:
        """What the next piece of work is."""
        stage = self._task.stage
        assert stage in ("prepare", "denoise", "decode")
        return "cached" if self._task.step_share < 1.0 else stage

    @property
    def num_bytes(self) -> int:
        """Memory that it holds; it goes with the request."""
        return self._task.num_bytes

    def work(self) -> int:
        """What the next piece of work costs, in places of the latents that are computed."""
        kind = self.kind
        if kind == "prepare":
            return 0
        is_guided = self.request.params.guidance_scale > 1.0 and not self._model.embeds_guidance
        forwards = 2 if is_guided else 1
        if kind == "decode":
            return self._num_places() * _DECODE_FORWARDS
        return math.ceil(self._num_places() * forwards * self._task.step_share)

    def advance(self) -> ImageUpdate | None:
        """Do it; None if there is nothing to tell."""
        task, kind = self._task, self.kind
        task.step()
        if kind == "prepare":
            return None
        if kind in ("denoise", "cached"):
            return self._update(preview=self._preview())
        self.num_latents += self._num_places()
        update = self._update(image=task.images[0])
        self._index += 1
        if not self.is_done:
            self._task = self._new_task()
        return update

    def cancel(self) -> None:
        """Free what it holds."""
        self._task.cancel()

    def _new_task(self) -> ImageTask:
        request = self.request
        seed = request.seeds[self._index]
        return ImageTask(self._model, [request.prompt], [seed], request.params)

    def _num_places(self) -> int:
        factor = self._model.scale_factor
        return (self._task.height // factor) * (self._task.width // factor)

    def _preview(self) -> FloatArray | None:
        """Previews lie evenly between the first step and the last, which is the picture's own."""
        done, steps = self._task.steps_done, self._task.num_steps
        wanted = min(self.request.num_previews, steps - 1)
        if done == steps or done * (wanted + 1) // steps == (done - 1) * (wanted + 1) // steps:
            return None
        clean = self._task.clean
        return None if clean is None else self._previews.picture(clean[0])

    def _update(
        self, *, preview: FloatArray | None = None, image: FloatArray | None = None
    ) -> ImageUpdate:
        request, task = self.request, self._task
        return ImageUpdate(
            request.request_id,
            self._index,
            request.seeds[self._index],
            task.steps_done,
            task.num_steps,
            task.width,
            task.height,
            self._num_places(),
            preview,
            image,
        )
