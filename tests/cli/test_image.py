"""``fuserve image`` paints from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Run, RunJson
from tests.diffusion.model_folders import small_sd

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sd")
    small_sd(folder)
    return str(folder / "model")


SMALL = ["--steps", "2", "--seed", "7", "--width", "48", "--height", "32"]


def test_a_picture_and_its_story_are_written(run: Run, model: str, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    result = run("image", "a red circle", "--model", model, *SMALL, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(out)
    assert "seed 7, 2 steps of DDIM" in result.stderr
    with Image.open(out) as picture:
        assert picture.size == (48, 32)
        assert "Seed: 7" in picture.text["parameters"]  # type: ignore[attr-defined]


def test_several_pictures_are_numbered_and_repeat(
    run_json: RunJson, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.png"
    report = run_json(
        "image", "a red circle", "--model", model, *SMALL, "--num-images", "2", "--out", str(out)
    )
    assert report["images"] == [
        {"file": str(tmp_path / "x-1.png"), "seed": 7},
        {"file": str(tmp_path / "x-2.png"), "seed": 8},
    ]
    assert (report["steps"], report["width"], report["height"]) == (2, 48, 32)
    again = [*SMALL[:2], "--seed", "8", *SMALL[4:]]
    run_json("image", "a red circle", "--model", model, *again, "--out", str(out))
    with Image.open(out) as alone, Image.open(tmp_path / "x-2.png") as second:
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(second))


def test_the_error_of_step_caching_is_told(
    run: Run, run_json: RunJson, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.png"
    flags = ["--steps", "5", "--seed", "7", "--width", "32", "--height", "32", "--out", str(out)]
    cached = ["--cache-interval", "2", "--cache-branch", "1", "--compare", "--num-images", "2"]
    report = run_json("image", "a red circle", "--model", model, *flags, *cached)
    assert len(report["differences"]) == 2
    for each in report["differences"]:
        assert each["psnr_db"] > 5
        assert 0 < each["latents_error"] < 1
    assert report["full_seconds"] > 0
    run_json("image", "a red circle", "--model", model, *flags)
    with Image.open(tmp_path / "x-1.png") as one, Image.open(out) as full:
        pixels = [np.asarray(each, np.float64) for each in (one, full)]
        assert "Cache interval: 2" in one.text["parameters"]  # type: ignore[attr-defined]
    psnr_db = 10 * np.log10(255**2 / np.mean((pixels[0] - pixels[1]) ** 2))
    assert report["differences"][0]["psnr_db"] == pytest.approx(psnr_db)
    told = run("image", "a red circle", "--model", model, *flags, *cached).stderr
    assert "PSNR" in told
    assert "without the cache" in told


def test_a_memory_budget_is_held_or_refused(
    run: Run, run_json: RunJson, model: str, tmp_path: Path
) -> None:
    flags = ["image", "red", "--model", model, *SMALL, "--out", str(tmp_path / "x.png")]
    assert " of 1.00 GB" in run_json(*flags, "--memory", "1GB")["memory"]
    result = run(*flags, "--memory", "10MB")
    assert result.exit_code == 2
    assert "0.01 GB of memory are too little" in result.stderr
    assert "Give as much" in result.stderr


def test_a_picture_can_be_the_start(run_json: RunJson, model: str, tmp_path: Path) -> None:
    start, mask, out = (tmp_path / name for name in ("start.png", "mask.png", "x.png"))
    Image.new("RGB", (70, 50), (200, 30, 30)).save(start)
    Image.new("L", (70, 50), 255).save(mask)
    files = ["--init-image", str(start), "--mask", str(mask), "--strength", "0.6"]
    report = run_json("image", "blue", "--model", model, "--steps", "4", *files, "--out", str(out))
    assert (report["width"], report["height"]) == (64, 48)  # multiples of 16, as this model needs


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--scheduler", "fancy"], "dpm++2m-karras"),
        (["--strength", "0.5"], "--init-image"),
        (["--out", "x.doc"], "suffix"),
        (["--out", "/no/such/folder/x.png"], "folder"),
        (["--init-image", "/no/such.png"], "/no/such.png"),
        (["--guidance-rescale", "3"], "guidance_rescale"),
        (["--compare"], "--cache-interval"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    run: Run, flags: list[str], word: str
) -> None:
    result = run("image", "red", "--model", "/no/such/model", *flags)
    assert result.exit_code == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1
