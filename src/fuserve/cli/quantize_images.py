"""``fuserve quantize`` of a diffusion model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fuserve.cli.output import WorkProgress, human_bytes, note, print_facts, print_json
from fuserve.errors import InvalidRequestError

_PANEL = "Calibration of a diffusion model"


def _calibration(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, **limits)


@dataclass(frozen=True, slots=True)
class ImageCalibrationFlags:
    """What a diffusion model is calibrated on, and what becomes of what stays in float."""

    prompts: Annotated[
        Path | None,
        _calibration("--prompts", help="Prompts to paint, one a line; by default packaged ones."),
    ] = None
    num_prompts: Annotated[
        int, _calibration("--num-prompts", help="How many of them are painted.", min=1)
    ] = 8
    steps: Annotated[
        int | None,
        _calibration("--steps", help="Denoising steps of each; by default the model's.", min=1),
    ] = None
    guidance_scale: Annotated[
        float,
        _calibration("--guidance-scale", help="1 for models that are run without it.", min=0),
    ] = 7.5
    dtype: Annotated[
        Literal["auto", "float16"],
        _calibration("--dtype", help="Of what stays in float; auto is as stored."),
    ] = "auto"


def quantize_images(
    model: str,
    output: Path,
    grid: tuple[str, int | None, bool | None],
    layers: Sequence[str],
    alpha: float | None,
    seed: int,
    flags: ImageCalibrationFlags,
    *,
    json: bool,
) -> None:
    """Quantize and say what became of it; ``grid`` is scheme, group size and symmetry.

    Raises:
        InvalidRequestError: there is no such scheme for diffusion models.
    """
    from fuserve.calibration.images import (
        IMAGE_RECIPES,
        ImageCalibrationOptions,
        quantize_image_model,
    )
    from fuserve.quantization import LayerChoice, recipe_named

    scheme, group_size, symmetric = grid
    if symmetric is False:
        raise InvalidRequestError("A diffusion model's weights are symmetric.")
    recipe = recipe_named(scheme, group_size, recipes=IMAGE_RECIPES)
    choice = LayerChoice.parse(recipe, layers, IMAGE_RECIPES)
    options = ImageCalibrationOptions(
        flags.num_prompts, flags.steps, flags.guidance_scale, seed, alpha
    )
    started = time.perf_counter()
    with WorkProgress() as progress:
        report = quantize_image_model(
            model,
            output,
            choice,
            options,
            prompts=flags.prompts,
            half=flags.dtype == "float16",
            progress=progress.update,
        )
    seconds = time.perf_counter() - started
    if json:
        print_json({"model": model, **asdict(report), "folder": str(output), "seconds": seconds})
        return
    note("note: only fuserve reads the folder's unet; diffusers refuses it.")
    print_facts(
        f"{model} as {scheme}",
        {
            "folder": str(output),
            "unet": " -> ".join(map(human_bytes, report.unet_bytes)),
            "all weights": " -> ".join(map(human_bytes, report.num_bytes)),
            "layers": ", ".join(f"{n} {what}" for what, n in report.schemes.items()),
            "calibrated on": f"{report.num_prompts} prompts, {report.num_evaluations} evaluations",
            "time": f"{seconds:.1f} s",
        },
    )
