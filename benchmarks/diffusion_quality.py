"""What do quantization and few steps cost the pictures? A trained model, the same seeds throughout.

    python benchmarks/diffusion_quality.py demo-diffusion --captions 100

Quantizes the model by each scheme, paints captions that training held out with each schedule, and
prints how many pictures show what their caption says (``tools/demo_diffusion/score.py``; only the
demo model knows such captions) and their PSNR against those of the float model with the same seeds
and schedule: the median, and the worst tenth's best. Calibration is on captions of training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fuserve.calibration.images import (
    IMAGE_RECIPES,
    ImageCalibrationOptions,
    quantize_image_model,
)
from fuserve.diffusion.image_file import to_pixels
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.pipeline import ImageTask
from fuserve.quantization import LayerChoice, recipe_named

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools.demo_diffusion import scenes, score

BATCH = 20
CALIBRATION_SEED, CAPTION_SEED = 12, 11
"""Of the captions: the second's are those of the model card."""

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler and its steps, ``ddim:20`` on the command line."""

    scheduler: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Of the command line's form."""
        name, _, steps = text.partition(":")
        return cls(name, int(steps))

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.steps} steps"


def main() -> None:
    """Quantize, paint, print the table, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a diffusers folder, or demo-diffusion")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--schemes", default="w8a8,w8a8-static,w4a8")
    parser.add_argument("--schedules", default="ddim:20,dpm++2m:8,dpm++2m:4")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--num-prompts", type=int, default=8, help="to calibrate on")
    parser.add_argument("--work", type=Path, help="keep the quantized folders here")
    args = parser.parse_args()
    captions = list(
        itertools.islice(scenes.captions(np.random.default_rng(CAPTION_SEED), True), args.captions)
    )
    schedules = [Schedule.parse(text) for text in args.schedules.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folders = {"float32": args.model} | {
            scheme: quantized(args.model, scheme, work, args.num_prompts, args.guidance_scale)
            for scheme in args.schemes.split(",")
        }
        exact: dict[Schedule, Pictures] = {}
        for scheme, folder in folders.items():
            model = DiffusionModel.load(folder, DiffusionOptions())
            for schedule in schedules:
                pictures = painted(model, captions, schedule, args.guidance_scale)
                exact.setdefault(schedule, pictures)
                row = {"scheme": scheme, "schedule": str(schedule)}
                row |= measured(pictures, exact[schedule], captions)
                rows.append(row)
                print("\t".join(map(str, row.values())), flush=True)
    print(table(rows))
    print(json.dumps({"model": str(args.model), "captions": args.captions, "rows": rows}))


def quantized(model: str, scheme: str, work: Path, num_prompts: int, guidance: float) -> str:
    """The folder of the model in a scheme; one that is there is taken."""
    folder = work / scheme
    if not (folder / "model_index.json").exists():
        training = scenes.captions(np.random.default_rng(CALIBRATION_SEED))
        prompts = work / "prompts.txt"
        prompts.write_text("\n".join(map(str, itertools.islice(training, num_prompts))))
        options = ImageCalibrationOptions(num_prompts, guidance_scale=guidance)
        choice = LayerChoice(recipe_named(scheme, recipes=IMAGE_RECIPES), ())
        quantize_image_model(model, folder, choice, options, prompts=prompts)
    return str(folder)


def painted(
    model: DiffusionModel, captions: Sequence[scenes.Caption], schedule: Schedule, guidance: float
) -> Pictures:
    """A picture of each caption; caption n with seed n."""
    params = ImageParams(
        steps=schedule.steps, scheduler=schedule.scheduler, guidance_scale=guidance
    )
    pictures: Pictures = []
    for first in range(0, len(captions), BATCH):
        texts = [str(caption) for caption in captions[first : first + BATCH]]
        task = ImageTask(model, texts, range(first, first + len(texts)), params)
        pictures += [to_pixels(image) for image in task.run()]
    return pictures


def measured(
    pictures: Pictures, exact: Pictures, captions: Sequence[scenes.Caption]
) -> dict[str, float | None]:
    """Shares of right pictures in percent, and PSNR in dB, None for equal ones."""
    pairs = zip(pictures, captions, strict=True)
    shares = score.share([score.judge(picture, caption) for picture, caption in pairs])
    ratios = [psnr(ours, theirs) for ours, theirs in zip(pictures, exact, strict=True)]
    finite = np.isfinite(ratios).any()
    return {
        "content": round(100 * shares["content"], 1),
        "whole": round(100 * shares["whole"], 1),
        "psnr_median": round(float(np.median(ratios)), 1) if finite else None,
        "psnr_tenth": round(float(np.quantile(ratios, 0.1, method="lower")), 1) if finite else None,
    }


def psnr(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Of 8-bit pictures, in dB."""
    error = np.mean(np.square(ours.astype(np.float64) - theirs))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows in markdown."""
    lines = [
        "| scheme | schedule | content right | all right | PSNR, median | PSNR, worst tenth |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["scheme"]), str(row["schedule"])]
        cells += [f"{row[name]} %" for name in ("content", "whole")]
        for name in ("psnr_median", "psnr_tenth"):
            cells.append("" if row[name] is None else f"{row[name]} dB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
