"""Running a denoiser over prompts and timesteps, to see what its layers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fuserve.calibration.images.layers import ChosenLayer, in_channels
from fuserve.calibration.images.options import ImageCalibrationOptions
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.parts import ModelParts
from fuserve.diffusion.pipeline import ImageTask
from fuserve.diffusion.program import Array, Conv, Linear
from fuserve.errors import UnsupportedModelError
from fuserve.quantization.statistics import InputObserver, InputStatistics

SAMPLE_ROWS = 256
"""Pixels or tokens of each input that are kept, at even distances over prompts and timesteps, and
from all over the image."""

Progress = Callable[[str, int, int], None]


def observe_inputs(
    parts: ModelParts,
    layers: Sequence[ChosenLayer],
    prompts: Sequence[str],
    options: ImageCalibrationOptions,
    progress: Progress,
) -> tuple[Mapping[tuple[str, ...], InputStatistics], int]:
    """What each layer reads, after its norm, by the names of its weights; and how often it ran.

    The prompts are painted in full precision, without decoding, at the size that the model was
    trained on. Memory: the float model, the values of one evaluation, and the samples.

    Raises:
        UnsupportedModelError: the model's scheduler, or that it paints over pictures only.
    """
    recorder = _Recorder(layers)
    model = DiffusionModel(parts, tap=recorder)
    if model.in_channels != model.latent_channels:
        raise UnsupportedModelError(
            f"The model's config field 'unet.in_channels' is {model.in_channels}. Quantizing is "
            f"supported with {model.latent_channels}, of models that do not read a picture."
        )
    params = ImageParams(steps=options.steps, guidance_scale=options.guidance_scale)
    tasks = [
        ImageTask(model, [prompt], [options.seed + index], params)
        for index, prompt in enumerate(prompts)
    ]
    total = sum(task.num_steps for task in tasks)
    recorder.num_evaluations = total
    done = 0
    for task in tasks:
        while task.stage != "decode":
            progress("observing inputs", done + task.steps_done, total)
            task.step()
        done += task.num_steps
        task.cancel()
    return recorder.statistics(), total


class _Recorder:
    """A tap that gathers statistics of the inputs of some layers and changes nothing."""

    def __init__(self, layers: Sequence[ChosenLayer]) -> None:
        self._channels = {layer.op.weight: in_channels(layer.op) for layer in layers}
        self._observers: dict[tuple[str, ...], InputObserver] = {}
        self.num_evaluations = 1

    def __call__(self, op: Conv | Linear, x: Array) -> Array:
        if op.weight in self._channels:
            rows = x.reshape(-1, self._channels[op.weight])
            if op.weight not in self._observers:
                self._observers[op.weight] = InputObserver(
                    rows.shape[1],
                    len(rows) * self.num_evaluations,
                    with_hessian=False,
                    sample_rows=SAMPLE_ROWS,
                )
            self._observers[op.weight].add(rows)
        return x

    def statistics(self) -> dict[tuple[str, ...], InputStatistics]:
        return {names: observer.result() for names, observer in self._observers.items()}
