"""The shipped demo model, as diffusers runs it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import safe_open

from tools.demo_diffusion import network, package, sample, scenes

MODEL = Path(__file__).parents[2] / package.PACKAGE / "fuserve_demo_diffusion" / "model"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    return loaded


def test_two_objects_of_held_out_captions_stand_where_they_should(
    pipeline: StableDiffusionPipeline,
) -> None:
    captions = list(itertools.islice(scenes.captions(np.random.default_rng(21), True), 16))
    painted = sample.pictures(pipeline, captions, steps=8, guidance=package.GUIDANCE)
    shares = sample.measure(painted, captions)
    assert shares["count"] >= 15 / 16
    assert shares["relation"] >= 15 / 16
    assert shares["content"] >= 13 / 16


def test_captions_that_mean_the_same_are_told_the_same(pipeline: StableDiffusionPipeline) -> None:
    opposite = {
        "above": "below",
        "below": "above",
        "to the left of": "to the right of",
        "to the right of": "to the left of",
    }
    every = scenes.captions(np.random.default_rng(24), True)
    for caption in itertools.islice(every, 20):
        first, second = caption.items
        turned, swapped = (
            replace(caption, items=(second, first), relation=relation)
            for relation in (opposite[caption.relation or ""], caption.relation)
        )
        texts = [str(each) for each in (caption, turned, swapped)]
        with torch.no_grad():
            states = pipeline.text_encoder(network.tokenize(pipeline.tokenizer, texts))[0][:, -5:]
        assert (states[1] - states[0]).norm() < 0.2 * states[0].norm()
        if first != second:
            assert (states[2] - states[0]).norm() > 0.2 * states[0].norm()


def test_another_caption_is_another_picture(pipeline: StableDiffusionPipeline) -> None:
    red, blue = (
        scenes.Caption((scenes.Item(c, "circle"),), None, "white") for c in ("red", "blue")
    )
    painted = sample.pictures(pipeline, [red], steps=6, guidance=package.GUIDANCE)
    assert sample.measure(painted, [red])["content"] == 1
    assert sample.measure(painted, [blue])["colours"] == 0


def test_it_is_a_small_f16_folder_without_pickles() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}
    for file in (file for file in files if file.suffix == ".safetensors"):
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert all(name.startswith("text_model.") for name in _names(MODEL / "text_encoder"))


def _names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return list(weights.keys())
