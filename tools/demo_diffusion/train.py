"""Train the demo model: ``python -m tools.demo_diffusion.train WORK_FOLDER``.

The stages: the text encoder, the autoencoder, the UNet.
What a stage has finished lies in the work folder, and a stopped run goes on from there; the folder
``model`` in it is the finished pipeline, which ``package.py`` measures and ships. Everything is
drawn from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo_diffusion import (
    folder,
    network,
    ranks,
    sample,
    scenes,
    tokenizer,
    train_autoencoder,
    train_text_encoder,
    train_unet,
)

TEXT_STEPS = 600
AUTOENCODER_STEPS = 1500
SCENES = 24_000
REPORT_STEPS = 250
GLIMPSE = 32  # captions painted at each report


def main() -> None:
    """Parse the arguments and run the stages that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    tokenizer.write(args.work / "tokenizer", network.MAX_TOKENS)
    ranks.run(args.ranks, train, args.work, args.seed)


def train(work: Path, seed: int) -> None:
    """Run, in each rank, the stages that are not finished."""
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = _text_encoder(work / "text_encoder", words, seed)
    vae = _autoencoder(work / "vae", seed)
    trainer = train_unet.Trainer(_scenes(work, vae, words, seed), text_encoder, seed)
    checkpoint = work / "unet.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"goes on from step {trainer.step}", flush=True)

    def report(trainer: train_unet.Trainer) -> None:
        if ranks.rank() > 0:
            return
        trainer.save(checkpoint)
        _note_time(work, "unet", trainer.cpu_seconds)
        folder.write(work / "model", vae, trainer.average, text_encoder)
        _glimpse(work, trainer.step)

    trainer.run(train_unet.STEPS, REPORT_STEPS, report)


def _text_encoder(place: Path, words: CLIPTokenizer, seed: int) -> CLIPTextModel:
    if not place.exists():
        with _timed(place.parent, "text encoder"):
            model = train_text_encoder.train(words, TEXT_STEPS, seed)
        _write(lambda: model.save_pretrained(place))
    return CLIPTextModel.from_pretrained(place)


def _autoencoder(place: Path, seed: int) -> AutoencoderKL:
    if not place.exists():
        with _timed(place.parent, "autoencoder"):
            model = train_autoencoder.train(AUTOENCODER_STEPS, seed)
        _write(lambda: model.save_pretrained(place))
    return AutoencoderKL.from_pretrained(place).to(memory_format=torch.channels_last).eval()


def _scenes(work: Path, vae: AutoencoderKL, words: CLIPTokenizer, seed: int) -> train_unet.Encoded:
    place = work / "scenes.safetensors"
    if not place.exists():
        with _timed(work, "encoding"):
            data = train_unet.encode(vae, words, SCENES, seed)
        _write(lambda: vae.save_pretrained(work / "vae"))  # it knows its scaling factor now
        _write(lambda: save_file(dataclasses.asdict(data), place))
    return train_unet.Encoded(**load_file(place))


def _write(write: Callable[[], None]) -> None:
    """Let the first rank write while the others wait."""
    if ranks.rank() == 0:
        write()
    ranks.meet()


@contextlib.contextmanager
def _timed(work: Path, stage: str) -> Iterator[None]:
    before = time.process_time()
    yield
    _note_time(work, stage, time.process_time() - before)


def _note_time(work: Path, stage: str, cpu_seconds: float) -> None:
    """Keep what a stage took of each rank's CPU time, for the model card."""
    if ranks.rank() > 0:
        return
    file = work / "cpu_seconds.json"
    noted = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(noted | {stage: round(cpu_seconds)}, indent=2) + "\n")


def _glimpse(work: Path, step: int) -> None:
    """Paint some held-out captions with few steps, to see where the run stands."""
    captions = list(itertools.islice(scenes.captions(np.random.default_rng(7), True), GLIMPSE))
    pipeline = StableDiffusionPipeline.from_pretrained(work / "model", torch_dtype=torch.float32)
    painted = sample.pictures(pipeline, captions, steps=8, guidance=2.0)
    sample.contact_sheet(painted, work / f"step-{step:05}.png")
    shares = sample.measure(painted, captions)
    print(f"unet {step}: {', '.join(f'{k} {v:.0%}' for k, v in shares.items())}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
