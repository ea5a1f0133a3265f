"""A diffusion model that denoises in several processes, as rank 0 has it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.image_model import Denoiser
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.network import Backend
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.packed_weights import PackingOptions
from fuserve.diffusion.program import Array
from fuserve.diffusion.prompts import PromptEmbeds
from fuserve.diffusion.step_cache import StepCache
from fuserve.errors import InvalidRequestError, RankFailedError
from fuserve.kernels.machine import num_threads
from fuserve.parallel.images.assignment import ImageAssignment
from fuserve.parallel.images.commands import Predict, Prepare, Release
from fuserve.parallel.images.group import ImageGroup
from fuserve.parallel.images.options import ImageParallelOptions
from fuserve.parallel.images.rank_denoiser import RankDenoiser
from fuserve.parallel.placement import on_cpus, place_ranks, threads_of_ranks


def load_image_model(
    model: str | Path,
    options: DiffusionOptions,
    parallel: ImageParallelOptions,
) -> DiffusionModel:
    """Load a diffusion model into this process, and have the ranks beside it denoise too.

    Args:
        model: as of ``DiffusionModel.load``.
        options: likewise; ``num_threads`` is each rank's, None shares out the usable cores.
        parallel: how many ranks.

    Raises:
        RankFailedError: a rank does not start.
        InvalidRequestError: the reference executor is asked for.
        FuserveError: as ``DiffusionModel.load``.
    """
    if parallel.num_ranks == 1:
        return DiffusionModel.load(model, options)
    if options.executor != "native":
        raise InvalidRequestError(
            "The reference executor runs in one process: leave out cfg_parallel and "
            "patch_parallel, or use executor='native'."
        )
    places = place_ranks(parallel.num_ranks)
    threads = threads_of_ranks(parallel.num_ranks, options.num_threads)
    own_options = replace(options, num_threads=threads)
    group = ImageGroup(ImageAssignment(str(model), own_options, parallel), places)

    def denoising(packing: PackingOptions) -> Backend:
        with on_cpus(places[0]):
            return make_backend(own_options, packing, group.bands)

    # What is not denoising runs here alone, while the other ranks' cores are idle.
    alone = replace(options, num_threads=min(num_threads(), threads * parallel.num_ranks))
    loaded = GroupModel.load(model, alone, denoising)
    loaded.join(group)
    return loaded


class GroupModel(DiffusionModel):
    """See ``DiffusionModel``; what its denoisers predict, all ranks compute together.

    Prompts, schedulers and the autoencoder are rank 0's alone: the others get latents and send
    predictions. Ranks that have failed are started again for the next denoiser.
    """

    _group: ImageGroup | None = None

    def join(self, group: ImageGroup) -> None:
        """Start the ranks.

        Raises:
            RankFailedError: one does not start.
        """
        self._group = group
        self._numbers = 0
        self._denoisers: WeakValueDictionary[int, GroupDenoiser] = WeakValueDictionary()
        group.ensure()

    @property
    def group(self) -> ImageGroup:
        """The other ranks."""
        assert self._group is not None
        return self._group

    def release(self) -> None:
        """See ``DiffusionModel.release``; the other ranks' too."""
        super().release()
        with suppress(RankFailedError), self.group.telling(Release()):
            pass  # those that have failed have no memory, and the next denoiser starts them again

    def close(self) -> None:
        """End the ranks."""
        self.group.close()

    def set_loras(self, loras: Sequence[LoraOption]) -> None:
        """See ``DiffusionModel.set_loras``; what is under way with others ends with an error."""
        super().set_loras(loras)
        if self._group is not None:
            assignment = self._group.assignment
            options = replace(assignment.options, loras=tuple(loras))
            self._group.reassign(replace(assignment, options=options))

    def denoiser(
        self,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        timesteps: Array,
        height: int,
        width: int,
        *,
        guidance_scale: float = 1.0,
        step_cache: StepCache | None = None,
    ) -> Denoiser:
        """See ``DiffusionModel.denoiser``.

        Raises:
            RankFailedError: a rank cannot be started again, or has died.
            InvalidRequestError: also where the image has too few rows for its bands.
        """
        group = self.group
        bands = group.assignment.parallel.patch_parallel
        rows = height // self.size_multiple
        if rows < bands:
            raise InvalidRequestError(
                f"height={height} is too little for patch_parallel={bands}: each rank needs "
                f"{self.size_multiple} rows, so take {bands * self.size_multiple} or fewer ranks."
            )
        group.ensure()
        own = RankDenoiser(
            super().denoiser,
            self.out_channels,
            group.halves,
            positive,
            negative,
            timesteps,
            height,
            width,
            guidance_scale,
            step_cache,
        )
        number = self._numbers = self._numbers + 1
        made = GroupDenoiser(group, number, own)
        kept = tuple(n for n, one in self._denoisers.items() if one.starts == group.starts)
        command = Prepare(
            number, kept, positive, negative, timesteps, height, width, guidance_scale, step_cache
        )
        with group.telling(command):
            self._denoisers[number] = made
        return made


class GroupDenoiser:
    """See ``Denoiser``: what it predicts, all ranks compute.

    Args:
        group: the other ranks.
        number: by which they know it.
        own: this rank's part.
    """

    def __init__(self, group: ImageGroup, number: int, own: RankDenoiser) -> None:
        self._group, self._number, self._own = group, number, own
        self.starts = group.starts

    @property
    def num_bytes(self) -> int:
        """Memory of its own, in this rank."""
        return self._own.num_bytes

    def share(self, step: int, guided: bool = True) -> float:
        """See ``Denoiser.share``."""
        return self._own.share(step, guided)

    def predict(self, latents: Array, step: int, guided: bool = True) -> tuple[Array | None, Array]:
        """See ``Denoiser.predict``.

        Raises:
            RankFailedError: a rank has died or hangs; so it ends all that is under way.
        """
        if self.starts != self._group.starts:
            raise RankFailedError(
                "The processes that paint together have stopped, and were started again: send the "
                "request again."
            )
        with self._group.telling(Predict(self._number, latents, step, guided)):
            return self._own.predict(latents, step, guided)
