"""The same seed gives the same picture as diffusers' pipelines, on a tiny model."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask, seeds_of
from fuserve.errors import InvalidRequestError, UnsupportedModelError
from tests.diffusion.diffusers_model import DiffusersModel, as_nchw, embedding
from tests.diffusion.test_schedulers import (
    DPM,
    LCM_DREAMSHAPER,
    SD15,
    SD21,
    SD_TURBO,
    SDXL_TURBO,
    UNIPC,
    oracle,
)

PROMPT, NEGATIVE = "a red circle above a blue square", "blurry"
SEEDS = [7, 8]
NO_PROGRESS = {"disable": True}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over images in [0, 1]."""
    return float(-10 * np.log10(np.mean((ours - theirs) ** 2) + 1e-30))


def theirs(
    kind: str, model: DiffusersModel, seeds: list[int] = SEEDS, **keywords: Any
) -> np.ndarray:
    """What a pipeline of diffusers paints with the same modules."""
    pipeline = getattr(diffusers, kind)(
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        unet=model.unet,
        scheduler=oracle(dict(model.scheduler_config)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(**NO_PROGRESS)
    images = pipeline(
        prompt_embeds=embedding(PROMPT),
        negative_prompt_embeds=embedding(NEGATIVE),
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **keywords,
    ).images
    return np.asarray(images)


def ours(model: DiffusersModel, params: ImageParams) -> np.ndarray:
    return ImageTask(model, [PROMPT] * len(SEEDS), SEEDS, params).run()


def picture(height: int = 24, width: int = 16) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.random((height, width, 3), np.float32)


@pytest.mark.parametrize(
    ("config", "steps", "scale"),
    [
        (SD15, 20, 7.5),
        (SD21, 10, 5.0),
        (DPM, 12, 7.5),
        (UNIPC, 8, 4.0),
        (SD_TURBO, 1, 0.0),
        (SDXL_TURBO, 4, 1.0),
        (LCM_DREAMSHAPER, 4, 2.0),
    ],
)
def test_text_to_image_is_that_of_diffusers(
    config: dict[str, Any], steps: int, scale: float
) -> None:
    model = DiffusersModel(config)
    expected = theirs(
        "StableDiffusionPipeline",
        model,
        num_inference_steps=steps,
        guidance_scale=scale,
        height=24,
        width=16,
    )
    params = ImageParams(NEGATIVE, steps=steps, guidance_scale=scale, height=24, width=16)
    assert psnr(ours(model, params), expected) > 80.0


def test_guidance_rescale_is_that_of_diffusers() -> None:
    model = DiffusersModel(SD21)
    expected = theirs("StableDiffusionPipeline", model, num_inference_steps=6, guidance_rescale=0.7)
    assert psnr(ours(model, ImageParams(NEGATIVE, steps=6, guidance_rescale=0.7)), expected) > 80.0


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("config", [SD15, SDXL_TURBO, DPM])
def test_image_to_image_is_that_of_diffusers(config: dict[str, Any], strength: float) -> None:
    model = DiffusersModel(config)
    expected = theirs(
        "StableDiffusionImg2ImgPipeline",
        model,
        image=as_nchw(picture()[None]) * 2 - 1,
        strength=strength,
        num_inference_steps=6,
    )
    params = ImageParams(NEGATIVE, steps=6, strength=strength, init_image=picture())
    assert psnr(ours(model, params), expected) > 80.0


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("config", [SD15, SDXL_TURBO])
def test_inpainting_is_that_of_diffusers(
    config: dict[str, Any], strength: float, in_channels: int
) -> None:
    model = DiffusersModel(config, in_channels)
    mask = np.zeros((24, 16), np.float32)
    mask[4:15, 6:] = 1.0
    params = ImageParams(NEGATIVE, steps=6, strength=strength, init_image=picture(), mask=mask)
    painted = ours(model, params)
    for image, seed in zip(painted, SEEDS, strict=True):
        (expected,) = theirs(  # of several, diffusers draws all encodings from the first seed
            "StableDiffusionInpaintPipeline",
            model,
            [seed],
            image=as_nchw(picture()[None]) * 2 - 1,
            mask_image=torch.from_numpy(mask)[None, None],
            strength=strength,
            num_inference_steps=6,
            height=24,
            width=16,
        )
        assert psnr(image, expected) > 80.0


def test_a_picture_is_the_same_alone_and_beside_others() -> None:
    model = DiffusersModel(SDXL_TURBO)
    params = ImageParams(NEGATIVE, steps=3, guidance_scale=3.0)
    alone = ImageTask(model, [PROMPT], [8], params)
    other = ImageTask(model, ["another"], [9], params)
    while alone.stage != "done":  # their steps take turns
        alone.step()
        other.step()
    together = ImageTask(model, ["another", PROMPT], [1, 8], params).run()
    assert psnr(alone.images[0], together[1]) > 80.0  # torch's kernels depend on the batch


def test_seeds_of_several_pictures_follow_each_other() -> None:
    assert seeds_of(ImageParams(seed=5, num_images=3)) == [5, 6, 7]
    drawn = {seeds_of(ImageParams())[0] for _ in range(4)}
    assert len(drawn) == 4


def test_steps_outside_the_guidance_interval_do_without_the_negative_prompt() -> None:
    model = DiffusersModel(SD21)
    ours(model, ImageParams(NEGATIVE, steps=10, guidance_interval=(0.2, 0.6)))
    assert model.denoisers[-1].calls == [False] * 2 + [True] * 4 + [False] * 4


def test_no_guidance_needs_no_negative_prompt() -> None:
    model = DiffusersModel(SD21)
    ours(model, ImageParams(NEGATIVE, steps=2, guidance_scale=1.0))
    assert model.denoisers[-1].negative is None
    assert model.denoisers[-1].calls == [False, False]


def test_a_task_says_where_it_is_and_shows_what_it_has() -> None:
    model = DiffusersModel(SD21)
    task = ImageTask(model, [PROMPT], [1], ImageParams(steps=3))
    seen = []
    while task.stage != "done":
        seen.append((task.stage, task.steps_done, task.preview() is None))
        task.step()
    assert seen == [
        ("prepare", 0, True),
        ("denoise", 0, True),
        ("denoise", 1, False),
        ("denoise", 2, False),
        ("decode", 3, False),
    ]
    assert task.images.shape == (1, 16, 16, 3)


def test_the_last_preview_is_the_picture() -> None:
    model = DiffusersModel({**SD21, "set_alpha_to_one": True})
    task = ImageTask(model, [PROMPT], [1], ImageParams(steps=3))
    while task.stage != "decode":
        task.step()
    preview = task.preview()
    assert preview is not None
    np.testing.assert_allclose(preview, task.run(), atol=1e-6)


def test_a_cancelled_task_lets_go_of_its_memory_and_takes_no_step() -> None:
    model = DiffusersModel(SD21)
    task = ImageTask(model, [PROMPT], [1], ImageParams(steps=3))
    task.step()
    task.step()
    task.cancel()
    task.step()
    assert (task.stage, task.latents, model.decoded) == ("cancelled", None, 0)
    with pytest.raises(InvalidRequestError, match="cancelled"):
        _ = task.images


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_rescale": 2.0}, "guidance_rescale"),
        ({"num_images": 0}, "num_images"),
        ({"width": 0}, "width"),
        ({"strength": 0.5}, "init_image"),
        ({"mask": np.ones((4, 4), np.float32)}, "init_image"),
        ({"init_image": np.ones((4, 4), np.float32)}, "init_image"),
        ({"init_image": picture(), "mask": np.ones((4, 4), np.float32)}, "mask"),
        ({"init_image": picture(), "strength": 0.0}, "strength"),
    ],
)
def test_parameters_out_of_range_are_named(keywords: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        ImageParams(**keywords)


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"width": 15}, "multiple of 2"),
        ({"init_image": picture(), "width": 32}, "init_image has 16"),
        ({"init_image": picture(), "strength": 0.01, "steps": 5}, "strength=0.01"),
        ({"init_image": picture(), "steps": 1}, "strength=0.8 leaves none of 1"),
        ({"scheduler": "nothing"}, "scheduler"),
        ({"steps": 2000}, "steps"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_any_work(
    keywords: dict[str, Any], word: str
) -> None:
    model = DiffusersModel(SD21)
    with pytest.raises(InvalidRequestError, match=word):
        ImageTask(model, [PROMPT], [1], ImageParams(**keywords))


def test_an_inpainting_model_needs_a_mask() -> None:
    task = ImageTask(DiffusersModel(SD21, 9), [PROMPT], [1], ImageParams())
    with pytest.raises(InvalidRequestError, match="inpainting"):
        task.step()
    with pytest.raises(UnsupportedModelError, match="in_channels"):
        ImageTask(DiffusersModel(SD21, 5), [PROMPT], [1], ImageParams()).step()
