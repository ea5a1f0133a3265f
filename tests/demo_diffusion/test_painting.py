"""The shipped demo model, as fuserve runs it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fuserve import ImageParams, TextToImage
from fuserve.checkpoints.find import find_diffusion_model
from tools.demo_diffusion import package, sample, scenes


@pytest.fixture(scope="module")
def painter() -> Iterator[TextToImage]:
    with TextToImage("demo-diffusion", num_threads=2) as opened:
        yield opened


def _paint(painter: TextToImage, caption: str, seed: int, steps: int) -> np.ndarray:
    params = ImageParams(seed=seed, steps=steps, guidance_scale=package.GUIDANCE)
    return painter.generate(caption, params)[0].pixels


def test_it_paints_the_object_that_a_caption_names(painter: TextToImage) -> None:
    every = scenes.captions(np.random.default_rng(22))
    captions = list(itertools.islice((one for one in every if len(one.items) == 1), 20))
    painted = [_paint(painter, str(caption), i, 10) for i, caption in enumerate(captions)]
    assert sample.measure(painted, captions)["content"] >= 16 / 20


def test_it_paints_both_objects_where_held_out_captions_say(
    painter: TextToImage,
) -> None:
    captions = list(itertools.islice(scenes.captions(np.random.default_rng(23), True), 16))
    painted = [_paint(painter, str(caption), i, 10) for i, caption in enumerate(captions)]
    shares = sample.measure(painted, captions)
    assert shares["count"] >= 15 / 16
    assert shares["content"] >= 13 / 16


def test_a_seed_means_the_picture_that_it_means_in_diffusers(painter: TextToImage) -> None:
    caption = "a large green circle to the left of a small orange triangle on a black background"
    pipeline = StableDiffusionPipeline.from_pretrained(
        find_diffusion_model("demo-diffusion"), torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        caption,
        num_inference_steps=10,
        guidance_scale=package.GUIDANCE,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    ours = _paint(painter, caption, 5, 10)
    assert np.abs(ours - theirs * 255).max() <= 1
