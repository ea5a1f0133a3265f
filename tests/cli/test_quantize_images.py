"""``fuserve quantize`` of a diffusion model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, RunJson
from tests.diffusion.model_folders import small_sd

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FAST = ["--num-prompts", "1", "--steps", "1", "--guidance-scale", "1", "--alpha", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sd")
    small_sd(folder)
    return str(folder / "model")


def test_a_folder_is_quantized_and_painted_with(
    run: Run, run_json: RunJson, model: str, tmp_path: Path
) -> None:
    out, prompts = str(tmp_path / "out"), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    result = run("quantize", model, out, "--scheme", "w8a8", *FAST, "--prompts", str(prompts))
    assert result.exit_code == 0, result.stderr
    for expected in ("MB -> ", "int8 activations per tensor", "1 prompts, 1 evaluations"):
        assert expected in result.stdout
    assert "only fuserve reads" in result.stderr
    picture = str(tmp_path / "x.png")
    report = run_json("image", "a red circle", "-m", out, "--steps", "1", "--out", picture)
    assert report["images"][0]["file"] == picture
    again = run("quantize", out, str(tmp_path / "again"), "--scheme", "w8a8", *FAST)
    assert again.exit_code == 2
    assert "quantized already" in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheme", "gptq"], "choose one of w8a8, w8a8-static, w4a8"),
        (["--scheme", "w8a8", "--text", "book.txt"], "calibrated on prompts"),
        (["--scheme", "w8a8", "--format", "awq"], "calibrated on prompts"),
        (["--scheme", "w4a8", "--asymmetric"], "symmetric"),
        (["--scheme", "w4a8", "--group-size", "48"], "group_size 48"),
        (["--scheme", "w8a8", "--layer", "*=keep"], "no layer is left"),
    ],
)
def test_what_there_is_not_for_pictures_is_refused(
    run: Run, model: str, tmp_path: Path, flags: list[str], message: str
) -> None:
    result = run("quantize", model, str(tmp_path / "out"), *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_prompts_are_for_diffusion_models_only(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    flags = ["--scheme", "w8a8", "--prompts", "prompts.txt"]
    result = run("quantize", str(tmp_path), str(tmp_path / "out"), *flags)
    assert result.exit_code == 2
    assert "has no model_index.json" in result.stderr
