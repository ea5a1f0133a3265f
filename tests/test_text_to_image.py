"""A seed and a prompt give the picture that diffusers' pipeline gives, from the same folder."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fuserve import ImageParams, ImageProgress, TextToImage, load_image, load_mask
from fuserve.diffusion.image_file import to_pixels
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import LoraOption
from fuserve.diffusion.pipeline import ImageTask
from fuserve.errors import FuserveError, InvalidRequestError, MissingExtraError
from fuserve.text_to_image import as_lora
from tests.diffusion.model_folders import small_sd, small_sdxl
from tests.diffusion.test_pipeline import psnr

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT, NEGATIVE = "a red circle above", "naïve café!"
QUICK = ImageParams(steps=2, seed=1, width=32, height=32)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return small_sd(folder), folder / "model"


@pytest.fixture(scope="module")
def painter(sd: tuple[Any, Path]) -> TextToImage:
    return TextToImage(sd[1])


@pytest.mark.parametrize(("kind", "steps"), [("sd", 20), ("sdxl", 5)])
def test_a_seed_gives_diffusers_pictures(
    kind: str, steps: int, sd: tuple[Any, Path], tmp_path: Path
) -> None:
    pipeline, folder = sd if kind == "sd" else (small_sdxl(tmp_path), tmp_path / "model")
    expected = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=6.0,
        height=32,
        width=48,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="np",
    ).images
    params = ImageParams(
        NEGATIVE, steps=steps, guidance_scale=6.0, height=32, width=48, seed=7, num_images=2
    )
    together = ImageTask(DiffusionModel.load(folder), [PROMPT] * 2, [7, 8], params).run()
    assert psnr(together, expected) > 60.0
    with TextToImage(folder) as painter:
        images = painter.generate(PROMPT, params)
    assert [image.seed for image in images] == [7, 8]
    for alone, beside in zip(images, together, strict=True):
        np.testing.assert_array_equal(alone.pixels, to_pixels(beside))


def test_each_prompt_has_its_pictures_in_order(painter: TextToImage) -> None:
    several = ImageParams(steps=2, seed=1, num_images=2, width=32, height=32)
    images = painter.generate(["red", "blue"], [several, QUICK])
    assert [(image.prompt, image.seed) for image in images] == [("red", 1), ("red", 2), ("blue", 1)]
    (alone,) = painter.generate("red", ImageParams(steps=2, seed=2, width=32, height=32))
    np.testing.assert_array_equal(images[1].pixels, alone.pixels)
    assert not np.array_equal(images[0].pixels, images[2].pixels)


def test_progress_tells_each_step_and_shows_previews(painter: TextToImage) -> None:
    seen: list[tuple[str, int]] = []

    def watch(progress: ImageProgress) -> None:
        seen.append((progress.stage, progress.steps_done))
        preview = progress.preview()
        assert (preview is None) == (progress.stage == "done" or progress.steps_done == 0)
        assert preview is None or preview.shape == (32, 32, 3)

    painter.generate("red", QUICK, progress=watch)
    assert seen == [("denoise", 0), ("denoise", 1), ("decode", 2), ("done", 2)]


def test_a_preview_takes_its_turn_with_the_steps_of_other_threads(
    painter: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, held = painter._model.decode, []

    def noting(latents: np.ndarray) -> np.ndarray:
        held.append(painter._turn.locked())
        return decode(latents)

    monkeypatch.setattr(painter._model, "decode", noting)
    painter.generate("red", QUICK, progress=lambda progress: progress.preview())
    assert held == [True] * 3  # two previews and the picture


def test_what_the_progress_raises_ends_the_call(painter: TextToImage) -> None:
    steps = []

    def stop(progress: ImageProgress) -> None:
        steps.append(progress.steps_done)
        if progress.steps_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        painter.generate("red", QUICK, progress=stop)
    assert steps == [0, 1]


def test_threads_take_turns_and_get_the_same_pictures(painter: TextToImage) -> None:
    alone = [painter.generate(prompt, QUICK)[0].pixels for prompt in ("red", "blue")]
    found: dict[str, np.ndarray] = {}

    def paint(prompt: str) -> None:
        found[prompt] = painter.generate(prompt, QUICK)[0].pixels

    threads = [threading.Thread(target=paint, args=(prompt,)) for prompt in ("red", "blue")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(found["red"], alone[0])
    np.testing.assert_array_equal(found["blue"], alone[1])


def test_a_saved_png_tells_how_it_was_made(painter: TextToImage, tmp_path: Path) -> None:
    params = ImageParams("smudges, blur", steps=3, seed=9, scheduler="dpm++2m-karras")
    (image,) = painter.generate("a red circle – naïve", params)
    image.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image.pixels)
        text = read.text["parameters"]  # type: ignore[attr-defined]
    assert text.splitlines() == [
        "a red circle – naïve",
        "Negative prompt: smudges, blur",
        f"Steps: 3, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 9, "
        f"Size: {image.width}x{image.height}, Model: model",
    ]


def test_a_masked_picture_keeps_what_is_not_masked(painter: TextToImage, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (70, 50, 3), np.uint8)).save(tmp_path / "start.png")
    covered = np.zeros((70, 50), np.uint8)
    covered[:, 25:] = 255
    Image.fromarray(covered).save(tmp_path / "mask.png")
    start = load_image(tmp_path / "start.png", multiple=painter.size_multiple)
    assert start.shape == (64, 48, 3)
    mask = load_mask(tmp_path / "mask.png", 48, 64)
    params = ImageParams(steps=3, seed=2, init_image=start, mask=mask)
    (image,) = painter.generate("red", params)
    assert image.pixels.shape == (64, 48, 3)
    assert "Denoising strength: 1" in image.parameters
    other = painter.generate("blue", params)[0].pixels
    left, right = np.s_[:, :12], np.s_[:, 36:]  # the decoder sees somewhat beyond the border
    difference = np.abs(image.pixels.astype(int) - other).astype(float)
    assert difference[left].mean() < difference[right].mean()


@pytest.mark.parametrize("name", ["x.txt", "x", "nowhere/x.png"])
def test_a_file_that_cannot_be_written_is_refused(
    name: str, painter: TextToImage, tmp_path: Path
) -> None:
    (image,) = painter.generate("red", QUICK)
    with pytest.raises(InvalidRequestError):
        image.save(tmp_path / name)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(InvalidRequestError, match=r"words\.png"):
        load_image(tmp_path / "words.png")
    with pytest.raises(InvalidRequestError, match="no such file"):
        load_mask(tmp_path / "nothing.png", 8, 8)


def test_without_pillow_the_extra_is_named(
    painter: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (image,) = painter.generate("red", QUICK)  # painting needs none
    with pytest.raises(MissingExtraError, match=r"fuserve\[image\]"):
        image.save("x.png")


def test_a_closed_painter_says_so(sd: tuple[Any, Path]) -> None:
    painter = TextToImage(sd[1])
    painter.close()
    painter.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        painter.generate("red")


@pytest.mark.parametrize(
    ("given", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("C:/style.safetensors", "C:/style.safetensors", 1.0),
        ("a:b.safetensors:-1.5", "a:b.safetensors", -1.5),
    ],
)
def test_a_lora_may_come_with_a_scale(given: str, path: str, scale: float) -> None:
    assert as_lora(given) == LoraOption(path, scale)


def test_a_lora_that_is_not_there_is_named(sd: tuple[Any, Path]) -> None:
    with pytest.raises(FuserveError, match=r"nothing\.safetensors"):
        TextToImage(sd[1], loras=["/no/nothing.safetensors:0.5"])


def test_as_many_params_as_prompts(painter: TextToImage) -> None:
    with pytest.raises(InvalidRequestError, match="2 ImageParams for 1"):
        painter.generate("red", [QUICK, QUICK])
