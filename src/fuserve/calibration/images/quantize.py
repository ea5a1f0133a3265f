"""Quantizing a diffusion model into a new folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fuserve.calibration.images.layers import chosen_layers
from fuserve.calibration.images.observe import Progress, observe_inputs
from fuserve.calibration.images.options import ImageCalibrationOptions
from fuserve.calibration.images.output import UNET, ImageOutput
from fuserve.calibration.images.prompts import read_prompts
from fuserve.calibration.images.round_layer import round_layer
from fuserve.checkpoints.find import find_diffusion_model
from fuserve.diffusion.diffusers_folder import read_diffusers_folder
from fuserve.diffusion.parts import ModelParts
from fuserve.diffusion.weights import CheckpointWeights
from fuserve.errors import InvalidRequestError, UnsupportedModelError
from fuserve.quantization import LayerChoice, QuantizedLinear


@dataclass(frozen=True, slots=True)
class ImageQuantizationReport:
    """What was written.

    Attributes:
        folder: where.
        unet_bytes: that the denoiser's tensors take as they are stored, before and after.
        num_bytes: likewise of all parts that make a picture.
        num_prompts: prompts that were painted to calibrate.
        num_evaluations: of the denoiser, over all prompts and timesteps.
        schemes: how many layers have each scheme.
    """

    folder: Path
    unet_bytes: tuple[int, int]
    num_bytes: tuple[int, int]
    num_prompts: int
    num_evaluations: int
    schemes: Mapping[str, int]


def quantize_image_model(
    model: str | Path,
    output: Path,
    choice: LayerChoice,
    options: ImageCalibrationOptions,
    *,
    prompts: Path | None = None,
    half: bool = False,
    progress: Progress | None = None,
) -> ImageQuantizationReport:
    """Write a copy of a diffusion model whose denoiser is quantized.

    Args:
        model: a diffusers folder, or a hub id.
        output: a new or empty folder.
        choice: what each layer becomes, of ``IMAGE_RECIPES``.
        options: of calibration.
        prompts: a text file with one in each line; by default captions of the package.
        half: store what stays in float as float16.
        progress: called with what is done, how many of how many.

    Raises:
        InvalidRequestError: a single file, a model that is quantized already, no prompts, or an
            output that is not empty.
        ModelNotFoundError, CheckpointError, UnsupportedModelError: of the model.
    """
    path = find_diffusion_model(model)
    if path.is_file():
        raise InvalidRequestError(
            f"{path}: is a single file. Only diffusers folders can be quantized; write one with "
            "diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(...)."
        )
    report = progress or (lambda _stage, _done, _total: None)
    texts = read_prompts(prompts, options.num_prompts)
    parts = read_diffusers_folder(path)
    parts.check()
    folder = ImageOutput(path, output, half=half)
    layers = chosen_layers(parts.unet.spec, choice)
    weights = parts.unet.weights
    if weights.has_layers:
        raise UnsupportedModelError(
            f"{path / UNET / 'config.json'}: the model is quantized already. Quantize the original."
        )
    inputs, num_evaluations = observe_inputs(parts, layers, texts, options, report)
    rounded: dict[str, QuantizedLinear] = {}
    for index, layer in enumerate(layers):
        report("quantizing layers", index, len(layers))
        rounded |= round_layer(layer, weights, inputs[layer.op.weight], options.alpha)
    report("quantizing layers", len(layers), len(layers))
    folder.write_unet(weights.stored, layers, rounded)
    folder.write_rest()
    counts: dict[str, int] = {}
    for layer in layers:
        name = layer.scheme.describe()
        counts[name] = counts.get(name, 0) + 1
    written = read_diffusers_folder(output)
    return ImageQuantizationReport(
        output,
        (_stored_bytes(weights), _stored_bytes(written.unet.weights)),
        (_model_bytes(parts), _model_bytes(written)),
        len(texts),
        num_evaluations,
        counts,
    )


def _model_bytes(parts: ModelParts) -> int:
    vae = () if parts.vae is None else (parts.vae.weights,)
    networks = (parts.unet.weights, *vae, *(text.weights for text in parts.texts))
    return sum(map(_stored_bytes, networks))


def _stored_bytes(weights: CheckpointWeights) -> int:
    stored = weights.stored
    return sum(map(stored.num_bytes, stored.tensor_names()))
