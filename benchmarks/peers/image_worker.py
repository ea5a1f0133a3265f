"""What the image workers share: their arguments, their inputs, and the one JSON line they answer.

Each worker runs one engine in a process of its own: the UNet with a guided pair of latents, or the
decoder of an autoencoder, with random weights of a published configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
from worker import option, peak_rss_bytes

TOKENS, TEXT_CHANNELS, LATENT_CHANNELS, TIMESTEP = 77, 768, 4, 500

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageWork:
    """What to measure."""

    folder: Path  # of diffusers: config.json and safetensors
    part: str  # unet or vae
    threads: int
    size: int  # pixels of a side
    steps: int
    save: Path  # where the output goes, to be compared
    options: tuple[str, ...]

    def option(self, name: str, default: str = "") -> str:
        """The value of ``--option name=value``."""
        return option(self.options, name, default)

    def latents(self) -> Array:
        """One image's latents, channels last  # [1, height, width, channels]."""
        shape = (1, self.size // 8, self.size // 8, LATENT_CHANNELS)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def text(self) -> Array:
        """Hidden states of the negative and the positive prompt  # [2, tokens, channels]."""
        shape = (2, TOKENS, TEXT_CHANNELS)
        return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


class ImageEngine(Protocol):
    """A loaded network."""

    def run(self) -> Array:
        """One guided step, or one decoding; the result, channels last."""
        ...

    def details(self) -> dict[str, Any]:
        """What else the table's JSON should hold."""
        ...


def parse_work() -> ImageWork:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--part", choices=("unet", "vae"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--option", action="append", default=[])
    given = vars(parser.parse_args())
    return ImageWork(options=tuple(given.pop("option")), **given)


def run(load: Callable[[ImageWork], ImageEngine]) -> None:
    """Load, measure, and print the result as the last line of stdout."""
    work = parse_work()
    started = time.perf_counter()
    engine = load(work)
    load_s = time.perf_counter() - started
    loaded_rss_bytes = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(work.steps):
        started = time.perf_counter()
        result = engine.run()
        seconds.append(time.perf_counter() - started)
    np.save(work.save, result)
    print_answer(load_s, loaded_rss_bytes, seconds, engine.details())


def print_answer(
    load_s: float, loaded_rss_bytes: int, seconds: list[float], details: dict[str, Any]
) -> None:
    """The last line of stdout, of what each run took."""
    # The first run commits memory and is not counted where there are others.
    answer = {
        "load_s": load_s,
        "first_s": seconds[0],
        "seconds": median(seconds[1:] or seconds),
        "loaded_rss_bytes": loaded_rss_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        **details,
    }
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)
