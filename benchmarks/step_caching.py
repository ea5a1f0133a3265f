"""What does step caching save, and what does it change?

The demo model paints captions that it was not trained on, each seed in full and with every cache
interval and branch in turn. Printed are seconds per picture, the share of the time that is saved,
PSNR and the relative error of the latents against the picture in full, and how many pictures still
show what their captions say. Any other model has no caption score. Writes JSON, and the table in
docs/diffusion.md.

    python benchmarks/step_caching.py --write-docs
    python benchmarks/step_caching.py --model FOLDER --prompts "a harbour" --steps 20
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
from markdown_block import replace_block

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuserve import ImageParams, TextToImage
from fuserve.diffusion.difference import difference
from fuserve.diffusion.generated_image import GeneratedImage
from tools.demo_diffusion.scenes import Caption, captions
from tools.demo_diffusion.score import judge, share

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "diffusion.md"
RESULTS = HERE / "results"
SETTINGS = ((2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (5, 0), (5, 2))
MOST_DB = 99.0  # of equal pixels, in means


@dataclass(frozen=True)
class Row:
    """Means over all pictures; ``score`` is None where captions cannot be judged."""

    interval: int
    branch: int
    seconds: float
    saved: float
    psnr_db: float
    latents_error: float
    score: float | None


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    rows = measure(given)
    markdown = to_markdown(rows, given)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    report = {"model": given.model, "rows": [asdict(row) for row in rows]}
    (RESULTS / "step_caching.json").write_text(json.dumps(report, indent=2) + "\n")
    if given.write_docs:
        replace_block(DOCS, "step-caching", markdown)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo-diffusion")
    parser.add_argument("--prompts", nargs="+", help="instead of captions held out of training")
    parser.add_argument("--pictures", type=int, default=48, help="captions that are painted")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.name}")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> list[Row]:
    """All settings of a picture before the next picture, so that all meet the same machine."""
    wanted = [] if given.prompts else held_out(given.pictures)
    prompts = given.prompts or [str(caption) for caption in wanted]
    full = ImageParams(steps=given.steps, guidance_scale=given.guidance_scale)
    chosen = [
        full,
        *(replace(full, cache_interval=interval, cache_branch=b) for interval, b in SETTINGS),
    ]
    painted: list[list[GeneratedImage]] = [[] for _ in chosen]
    seconds: list[list[float]] = [[] for _ in chosen]
    with TextToImage(given.model, num_threads=given.threads) as painter:
        for params in chosen:
            painter.generate(prompts[0], replace(params, seed=0))  # packs the weights
        for seed, prompt in enumerate(prompts):
            for index, params in enumerate(chosen):
                begun_s = time.perf_counter()
                painted[index] += painter.generate(prompt, replace(params, seed=seed))
                seconds[index].append(time.perf_counter() - begun_s)
    usual_s = median(seconds[0])
    return [
        row(params, images, painted[0], median(times), usual_s, wanted)
        for params, images, times in zip(chosen, painted, seconds, strict=True)
    ]


def row(
    params: ImageParams,
    images: Sequence[GeneratedImage],
    exact: Sequence[GeneratedImage],
    seconds: float,
    usual_s: float,
    wanted: Sequence[Caption],
) -> Row:
    """One setting."""
    found = [difference(one, other) for one, other in zip(images, exact, strict=True)]
    return Row(
        params.cache_interval,
        params.cache_branch,
        seconds,
        1 - seconds / usual_s,
        mean(min(each.psnr_db, MOST_DB) for each in found),
        mean(each.latents_error for each in found),
        score(images, wanted) if wanted else None,
    )


def held_out(count: int) -> list[Caption]:
    """Captions that the demo model has not been trained on."""
    return list(itertools.islice(captions(np.random.default_rng(11), held_out=True), count))


def score(images: Sequence[GeneratedImage], wanted: Sequence[Caption]) -> float:
    """The share of the pictures that show colours, shapes and relation of their captions."""
    pairs = zip(images, wanted, strict=True)
    return share([judge(image.pixels, caption) for image, caption in pairs])["content"]


def to_markdown(rows: Sequence[Row], given: argparse.Namespace) -> str:
    """The table."""
    lines = [
        "| cache interval | branch | s a picture | saved | PSNR | latents' error | captions |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        score = "" if each.score is None else f"{each.score:.0%}"
        if each.interval == 1:
            lines.append(f"| 1 (in full) | | {each.seconds:.3f} | | | | {score} |")
            continue
        lines.append(
            f"| {each.interval} | {each.branch} | {each.seconds:.3f} | {each.saved:.0%} | "
            f"{each.psnr_db:.1f} dB | {each.latents_error:.1%} | {score} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
