"""Measure the trained model and ship it: ``python -m tools.demo_diffusion.package WORK_FOLDER``.

Paints captions that training held out, scores them, copies the folder into the data package and
writes the model card with the scores, contact sheet included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from tools.demo_diffusion import network, sample, scenes, train, train_unet

PACKAGE = Path("packages/fuserve-demo-diffusion")
GUIDANCE = 2.0
_SHEET = 32  # pictures on the contact sheet
_COLUMNS = ("content", "whole", "colours", "shapes", "relation", "sizes", "background")


def main() -> None:
    """Measure, copy, write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="the folder that train.py worked in")
    parser.add_argument("--captions", type=int, default=200, help="painted for each row")
    args = parser.parse_args()
    rows = _measure(args.work, args.captions)
    target = PACKAGE / "fuserve_demo_diffusion" / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(args.work / "model", target)
    (PACKAGE / "README.md").write_text(_card(args.work, args.captions, rows), "utf-8")
    print("\n".join(_table(rows)))


def _measure(work: Path, count: int) -> dict[str, dict[str, float]]:
    """Name of the measurement to its shares; the first one's pictures make the contact sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(work / "model", torch_dtype=torch.float32)
    held_out = list(itertools.islice(scenes.captions(np.random.default_rng(11), True), count))
    trained = list(itertools.islice(scenes.captions(np.random.default_rng(12)), count))
    never = list(itertools.islice(scenes.never_seen_captions(np.random.default_rng(13)), count))
    painted = sample.pictures(pipeline, held_out, 20, GUIDANCE)
    sample.contact_sheet(painted[:_SHEET], PACKAGE / "samples.png")
    rows = {
        "held-out captions, DDIM, 20 steps": sample.measure(painted, held_out),
        "captions of training, DDIM, 20 steps": _row(pipeline, trained, 20),
        "with an object never seen, DDIM, 20 steps": _row(pipeline, never, 20),
        "held-out captions, DDIM, 8 steps": _row(pipeline, held_out, 8),
    }
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for steps in (8, 6, 4):
        rows[f"held-out captions, DPM++ 2M, {steps} steps"] = _row(pipeline, held_out, steps)
    return rows


def _row(
    pipeline: StableDiffusionPipeline, captions: list[scenes.Caption], steps: int
) -> dict[str, float]:
    return sample.measure(sample.pictures(pipeline, captions, steps, GUIDANCE), captions)


def _table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| | {' | '.join(_COLUMNS)} |", f"|---|{'---|' * len(_COLUMNS)}"]
    for name, shares in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{shares[each]:.1%}' for each in _COLUMNS)} |")
    return lines


def _card(work: Path, count: int, rows: dict[str, dict[str, float]]) -> str:
    parts = {
        name: sum(file.stat().st_size for file in (work / "model" / name).glob("*.safetensors"))
        for name in ("unet", "text_encoder", "vae")
    }
    seconds = json.loads((work / "cpu_seconds.json").read_text())
    sizes = train_unet.BATCHES.values()
    steps = train_unet.step_of(work / "unet.safetensors")
    colours, shapes = ", ".join(scenes.COLOURS), ", ".join(scenes.SHAPES)
    never = " or a ".join(f"{colour} {shape}" for colour, shape in sorted(scenes.NEVER_SEEN))
    return f"""# fuserve-demo-diffusion

A small text-to-image latent diffusion model: 64x64 pictures of coloured shapes that stand as the
caption says, such as "a red circle above a blue square". It is a folder of diffusers'
`StableDiffusionPipeline` (`fuserve_demo_diffusion/model`), made to show and to measure fuserve's
diffusion engine with trained weights: quantization, caching, few-step sampling. Its name in fuserve
is `demo-diffusion`.

![Held-out captions](samples.png)

## What it understands
- One object, or two and their relation: {", ".join(scenes.RELATIONS)}.
- Colours: {colours}. Shapes: {shapes}. Sizes: small, large, or none said.
- "on a gray background" (or black, or white); {scenes.BACKGROUND} where none is said.

Anything else it does not know. It paints no people, places or texts.

## Parts
| part | f16 weights |
|---|---|
{chr(10).join(f"| {name} | {size / 1e6:.2f} MB |" for name, size in parts.items())}
| all | {sum(parts.values()) / 1e6:.2f} MB |

The UNet predicts velocities over 16x16 latents of 4 channels at three resolutions, two of them with
cross-attention. The text encoder is a CLIP text model of two layers; a prompt has at most
{network.MAX_TOKENS} tokens. The default scheduler is DDIM with trailing steps.

## Scores
{count} captions a row, guidance {GUIDANCE}, caption n drawn with seed n, diffusers on a CPU in fp32
from the f16 weights. `content`: number, colours, shapes and relation of the objects are all as the
caption says; `whole`: also the sizes and the background that it names. The judge is
`tools/demo_diffusion/score.py`, which finds every painted training scene right.

{chr(10).join(_table(rows))}

Held-out captions name two objects that training has shown, though never together. An object never
seen is a {never}, which training has not shown at all.

## Training
`python -m tools.demo_diffusion.train WORK_FOLDER` in fuserve's repository, seed 0,
two processes of one thread each. The text encoder learns to say what stands where
({train.TEXT_STEPS} steps) and stays as it is, the autoencoder learns from scenes and crowded
pictures ({train.AUTOENCODER_STEPS} steps), then the UNet learns from {train.SCENES} scenes
({steps} steps of {min(sizes)} and then {max(sizes)} scenes). CPU seconds of each of the two
processes:
{", ".join(f"{stage} {value}" for stage, value in seconds.items())}.

## Data and licence
All scenes are synthetic, painted by `tools/demo_diffusion/scenes.py`; no picture or text of others
is in the data. The weights and this package are under the Apache License 2.0, as fuserve is.
"""


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
