"""``fuserve image``: pictures from a prompt."""

from __future__ import annotations

import time
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fuserve.cli.flags import Debug, Json
from fuserve.cli.output import WorkProgress, note, print_json
from fuserve.cli.quantities import parse_bytes
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve import ImageParams, TextToImage
    from fuserve.diffusion.generated_image import GeneratedImage
    from fuserve.text_to_image import ImageProgress

_CACHE = "Step caching"
_START = "Starting from a picture"
_MODEL = "Model"
_PARALLEL = "Several processes"


def image(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A diffusers folder, a .safetensors file, a hub id, or 'demo-diffusion'.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write; of several, NAME-1.png and on.")
    ] = Path("image.png"),
    negative_prompt: Annotated[
        str, typer.Option("--negative-prompt", help="What the picture shall not show.")
    ] = "",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps; 20, or 4 with LCM.", min=1)
    ] = None,
    guidance_scale: Annotated[
        float,
        typer.Option("--guidance-scale", help="How much the prompt is exaggerated; 1 is not."),
    ] = 7.5,
    guidance_interval: Annotated[
        tuple[float, float],
        typer.Option("--guidance-interval", help="Part of the steps that are guided."),
    ] = (0.0, 1.0),
    guidance_rescale: Annotated[
        float, typer.Option("--guidance-rescale", help="Take back guidance's contrast, 0 to 1.")
    ] = 0.0,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.", min=1)] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.", min=1)] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="With the seeds SEED, SEED + 1, ...", min=1)
    ] = 1,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same picture.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            help="ddim, pndm, euler, euler-karras, euler-a, dpm++2m, dpm++2m-karras, dpm++2m-sde, "
            "dpm++2m-sde-karras, unipc or lcm; the model's by default.",
        ),
    ] = None,
    cache_interval: Annotated[
        int,
        typer.Option(
            "--cache-interval",
            help="Every so many steps one is computed in full; the others reuse its deep part.",
            min=1,
            rich_help_panel=_CACHE,
        ),
    ] = 1,
    cache_branch: Annotated[
        int,
        typer.Option(
            "--cache-branch",
            help="Skip connection up to which every step is computed; 0 saves most.",
            min=0,
            rich_help_panel=_CACHE,
        ),
    ] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Paint without the cache too, and tell the difference.",
            rich_help_panel=_CACHE,
        ),
    ] = False,
    init_image: Annotated[
        Path | None,
        typer.Option("--init-image", help="Start from this picture.", rich_help_panel=_START),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", help="How much of it is made anew, 0 to 1.", rich_help_panel=_START
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="White where it is made anew.", rich_help_panel=_START),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="PATH[:SCALE]",
            help="Add a LoRA; may be repeated.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Another autoencoder, such as TAESD.", rich_help_panel=_MODEL),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="CLIP's tokenizer, for a single file.", rich_help_panel=_MODEL
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16"],
        typer.Option(
            "--dtype", metavar="TYPE", help="Of the weights in memory.", rich_help_panel=_MODEL
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What it may take in all, such as 4GB; by default what is fastest.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    exact_conv: Annotated[
        bool,
        typer.Option(
            "--exact-conv", help="Convolve directly, or as exactly.", rich_help_panel=_MODEL
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            help="Of each process; by default all usable, shared out.",
            min=1,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    cfg_parallel: Annotated[
        int,
        typer.Option(
            "--cfg-parallel",
            help="2: the halves of guidance in processes of their own.",
            min=1,
            max=2,
            rich_help_panel=_PARALLEL,
        ),
    ] = 1,
    patch_parallel: Annotated[
        int,
        typer.Option(
            "--patch-parallel",
            help="Processes that make a band of the picture each.",
            min=1,
            rich_help_panel=_PARALLEL,
        ),
    ] = 1,
    step_timeout: Annotated[
        float,
        typer.Option(
            "--step-timeout",
            help="Seconds after which a step has a process that hangs.",
            min=0.1,
            rich_help_panel=_PARALLEL,
        ),
    ] = 600.0,
    join_timeout: Annotated[
        float,
        typer.Option(
            "--join-timeout",
            help="Seconds that a starting process may say nothing.",
            min=0.1,
            rich_help_panel=_PARALLEL,
        ),
    ] = 60.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Paint pictures of a prompt."""
    from fuserve import ImageParams, TextToImage
    from fuserve.diffusion.image_file import check_writable
    from fuserve.diffusion.schedulers import check_name

    # All that can be refused is refused before the model is loaded.
    if init_image is None and (mask is not None or strength is not None):
        raise InvalidRequestError("--mask and --strength need an --init-image.")
    if compare and cache_interval == 1:
        raise InvalidRequestError("--compare needs a --cache-interval above 1.")
    check_name(scheduler)
    params = ImageParams(
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        cache_interval=cache_interval,
        cache_branch=cache_branch,
        width=width,
        height=height,
        num_images=num_images,
        seed=seed,
        scheduler=scheduler,
    )
    check_writable(out)
    for file in (init_image, mask):
        if file is not None and not file.is_file():
            raise InvalidRequestError(f"{file}: there is no such file.")
    started = time.perf_counter()
    with WorkProgress() as progress:
        painter = TextToImage(
            model,
            dtype=dtype,
            memory_bytes=None if memory is None else parse_bytes("--memory", memory),
            vae=vae,
            tokenizer=tokenizer,
            loras=lora or [],
            exact_conv=exact_conv,
            num_threads=threads,
            cfg_parallel=cfg_parallel,
            patch_parallel=patch_parallel,
            step_timeout_s=step_timeout,
            join_timeout_s=join_timeout,
        )
        loaded = time.perf_counter()
        with painter:
            fitted = painter.memory
            params = _with_images(painter, params, init_image, strength, mask)
            images = painter.generate(prompt, params, progress=_shown_by(progress))
            ended = time.perf_counter()
            full = replace(params, cache_interval=1, seed=images[0].seed)
            exact = painter.generate(prompt, full, progress=_shown_by(progress)) if compare else []
            full_seconds = time.perf_counter() - ended
    files = [_numbered(out, i, len(images)) for i in range(len(images))]
    for file, painted in zip(files, images, strict=True):
        painted.save(file)
    report: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": images[0].steps,
        "guidance_scale": guidance_scale,
        "sampler": images[0].sampler,
        "width": images[0].width,
        "height": images[0].height,
        "images": [
            {"file": str(file), "seed": painted.seed}
            for file, painted in zip(files, images, strict=True)
        ],
        "load_seconds": loaded - started,
        "seconds": ended - loaded,
    }
    if compare:
        report["full_seconds"] = full_seconds
        report["differences"] = differences = _differences(images, exact)
    if fitted is not None:
        report["memory"] = fitted
    if json:
        print_json(report)
        return
    if fitted is not None:
        note(f"[{fitted}]")
    for file, painted in zip(files, images, strict=True):
        print(file)
        note(f"[seed {painted.seed}, {painted.steps} steps of {painted.sampler}]")
    note(f"[{ended - loaded:.1f} s, loaded in {loaded - started:.1f} s]")
    if compare:
        for each in differences:
            psnr = (
                "the same pixels" if each["psnr_db"] is None else f"PSNR {each['psnr_db']:.1f} dB"
            )
            note(f"[without the cache: {psnr}, latents differ by {each['latents_error']:.2%}]")
        note(f"[{full_seconds:.1f} s without the cache]")


def _differences(
    images: list[GeneratedImage], exact: list[GeneratedImage]
) -> list[dict[str, float | None]]:
    """Of each picture from that of the same seed without the cache; PSNR None is infinite."""
    from fuserve.diffusion.difference import difference

    found = [difference(one, other) for one, other in zip(images, exact, strict=True)]
    return [
        {
            "psnr_db": each.psnr_db if isfinite(each.psnr_db) else None,
            "latents_error": each.latents_error,
        }
        for each in found
    ]


def _with_images(
    painter: TextToImage,
    params: ImageParams,
    init_image: Path | None,
    strength: float | None,
    mask: Path | None,
) -> ImageParams:
    """The parameters with the pictures of the files, in a size that the model takes."""
    from fuserve import load_image, load_mask

    if init_image is None:
        return params
    start = load_image(init_image, params.width, params.height, painter.size_multiple)
    height, width, _ = start.shape
    covered = None if mask is None else load_mask(mask, width, height)
    return replace(
        params, init_image=start, strength=strength, mask=covered, width=width, height=height
    )


def _shown_by(progress: WorkProgress) -> Any:
    def show(state: ImageProgress) -> None:
        of_several = f" {state.image + 1} of {state.num_images}" if state.num_images > 1 else ""
        done = state.image * (state.num_steps + 1) + state.steps_done + (state.stage == "done")
        progress.update(
            f"image{of_several}, step {state.steps_done} of {state.num_steps}",
            done,
            state.num_images * (state.num_steps + 1),  # one for decoding
        )

    return show


def _numbered(out: Path, index: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
