"""A rank's own part of the model, and what it does when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.rank_executor import Gatherer
from fuserve.parallel.images.assignment import ImageAssignment
from fuserve.parallel.images.commands import Command, Predict, Prepare, Release, Stop
from fuserve.parallel.images.rank_denoiser import RankDenoiser


class RankModel:
    """Of a rank other than 0: its denoiser alone takes memory, as nothing else is used.

    Args:
        assignment: what all ranks are told.
        bands: to exchange what bands need; None: the rank has the whole image.
        halves: the other half of guidance; None: there is none.
    """

    def __init__(
        self, assignment: ImageAssignment, bands: Gatherer | None, halves: Gatherer | None
    ) -> None:
        options = assignment.options
        self._model = DiffusionModel.load(
            assignment.model,
            replace(options, num_threads=1),
            lambda packing: make_backend(options, packing, bands),
        )
        self._halves = halves
        self._denoisers: dict[int, RankDenoiser] = {}

    def obey(self, command: Prepare | Predict | Release) -> None:
        """Do what rank 0 does at the same time."""
        match command:
            case Prepare():
                self._denoisers = {number: self._denoisers[number] for number in command.kept}
                self._denoisers[command.number] = RankDenoiser(
                    self._model.denoiser,
                    self._model.out_channels,
                    self._halves,
                    command.positive,
                    command.negative,
                    command.timesteps,
                    command.height,
                    command.width,
                    command.guidance_scale,
                    command.step_cache,
                )
            case Predict():
                denoiser = self._denoisers[command.number]
                denoiser.predict(command.latents, command.step, command.guided)
            case Release():
                self._model.release()


def run_rank(model: RankModel, receive: Callable[[], Command]) -> None:
    """Obey until told to stop."""
    while not isinstance(command := receive(), Stop):
        model.obey(command)
