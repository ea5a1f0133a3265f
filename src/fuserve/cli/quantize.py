"""``fuserve quantize``: write a quantized copy of a model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fuserve.cli.flags import MODEL_HELP, Debug, Json
from fuserve.cli.output import WorkProgress, human_bytes, note, print_facts, print_json
from fuserve.cli.quantize_images import ImageCalibrationFlags, quantize_images
from fuserve.errors import InvalidRequestError

_PANEL = "Calibration"


def _calibration(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, **limits)


@dataclass(frozen=True, slots=True)
class CalibrationFlags:
    """How the numbers of a scheme are found."""

    text: Annotated[
        Path | None,
        _calibration("--text", help="Text or .jsonl to calibrate on; by default English prose."),
    ] = None
    num_samples: Annotated[
        int, _calibration("--num-samples", help="Windows of the text that are run.", min=1)
    ] = 128
    sample_tokens: Annotated[
        int, _calibration("--sample-tokens", help="Tokens of a window.", min=2)
    ] = 256
    seed: Annotated[int, _calibration("--seed", help="Chooses the windows.", min=0)] = 0
    alpha: Annotated[
        float | None,
        _calibration(
            "--alpha",
            help="SmoothQuant's migration strength; by default searched, and 0.7 for int8 weights "
            "of diffusion models.",
            min=0,
            max=1,
        ),
    ] = None
    pieces: Annotated[
        int, _calibration("--pieces", help="Pieces of features searched apart.", min=1)
    ] = 1
    channel_shift: Annotated[
        bool,
        _calibration("--channel-shift", help="SmoothQuant: even out ranges around zero first."),
    ] = False
    damping: Annotated[
        float, _calibration("--damping", help="GPTQ: part of the Hessian's mean diagonal.")
    ] = 0.01
    act_order: Annotated[
        bool, _calibration("--act-order/--no-act-order", help="GPTQ: large inputs first.")
    ] = True


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "-s",
            help="int8, int4, llm-int8, w8a8, w8a8-static, smoothquant, smoothquant-static, gptq, "
            "gptq-int8, awq or awq-int8; of a diffusion model w8a8, w8a8-static or w4a8.",
        ),
    ],
    flags: CalibrationFlags,
    image_flags: ImageCalibrationFlags,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Inputs sharing a scale: 32, 64, 128; 0: per channel."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Weights without or with zero points."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="PATTERN=SCHEME",
            help="Another scheme for some layers, such as 'layers.1.down=int8' or "
            "'layers.0.*=keep'; may be repeated, the first that matches wins.",
        ),
    ] = None,
    layout: Annotated[
        Literal["auto", "compressed-tensors", "gptq", "awq", "bitsandbytes"],
        typer.Option("--format", metavar="LAYOUT", help="How the folder stores quantized layers."),
    ] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized copy of a model as a Hugging Face folder, or as a diffusers folder.

    A language model's interrupted run goes on where it was when the same command is given again.
    """
    from fuserve.calibration import CalibrationOptions, quantize_model
    from fuserve.checkpoints import open_checkpoint
    from fuserve.checkpoints.find import is_diffusion_model
    from fuserve.quantization import LayerChoice, recipe_named
    from fuserve.quantization.smoothquant import Smoothing

    if is_diffusion_model(model):
        if flags != CalibrationFlags(alpha=flags.alpha, seed=flags.seed) or layout != "auto":
            raise InvalidRequestError(
                "A diffusion model is calibrated on prompts: of a language model's options only "
                "--alpha, --seed, --group-size and --layer are for it."
            )
        grid = (scheme, group_size, symmetric)
        quantize_images(
            model, output, grid, layer or [], flags.alpha, flags.seed, image_flags, json=json
        )
        return
    if image_flags != ImageCalibrationFlags():
        raise InvalidRequestError(
            "--prompts, --num-prompts, --steps, --guidance-scale and --dtype are for diffusion "
            f"models, and {model} has no model_index.json."
        )
    choice = LayerChoice.parse(recipe_named(scheme, group_size, symmetric), layer or [])
    if flags.text is not None and not any(one.needs_calibration for one in choice.recipes):
        raise InvalidRequestError(f"--scheme {scheme} needs no calibration: leave out --text.")
    options = CalibrationOptions(
        num_samples=flags.num_samples,
        sample_tokens=flags.sample_tokens,
        seed=flags.seed,
        smoothing=Smoothing(flags.alpha, flags.pieces, flags.channel_shift),
        damping=flags.damping,
        act_order=flags.act_order,
    )
    started = time.perf_counter()
    with WorkProgress() as progress:
        report = quantize_model(
            open_checkpoint(model),
            output,
            choice,
            options,
            layout=layout,
            text=flags.text,
            progress=progress.update,
        )
    seconds = time.perf_counter() - started
    for limit in report.limits:
        note(f"note: other readers will refuse this folder: {limit}")
    if json:
        print_json({"model": model, **asdict(report), "folder": str(output), "seconds": seconds})
        return
    print_facts(
        f"{model} as {scheme}",
        {
            "folder": str(output),
            "size": human_bytes(report.num_bytes),
            "linear layers": ", ".join(f"{n} {what}" for what, n in report.schemes.items()),
            "calibrated on": f"{report.num_samples} samples" if report.num_samples else "nothing",
            "time": f"{seconds:.1f} s",
        },
    )
