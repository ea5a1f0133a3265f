"""``fuserve serve --image-model``: the command from the shell to a picture."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from fuserve.diffusion.options import DiffusionOptions
from fuserve.server.images.build import ImageSettings, reserved_bytes
from tests.diffusion.model_folders import small_sd
from tests.server.imaging import pixels

FUSERVE = str(Path(sys.executable).with_name("fuserve"))


def test_an_image_model_is_served_alone(tmp_path: Path) -> None:
    small_sd(tmp_path)
    command = [FUSERVE, "serve", "--image-model", str(tmp_path / "model"), "--port", "0"]
    command += ["--served-image-model-name", "tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            (line,) = (line for line in [process.stderr.readline()] if "tiny is served at" in line)
            url = line.split(" is served at ")[1].split("/v1")[0]
            body = {"model": "tiny", "prompt": "a red circle", "steps": 2, "seed": 1}
            answer = httpx2.post(f"{url}/v1/images/generations", json=body, timeout=60)
            assert answer.status_code == 200
            width, height = map(int, answer.json()["size"].split("x"))
            assert pixels(answer.json()["data"][0]["b64_json"]).shape == (height, width, 3)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to serve: give --model, --image-model, or both"),
        (["--image-model", "/nowhere"], "/nowhere"),
        (["--image-model", "x", "--image-memory", "much"], "--image-memory"),
        (["--model", "demo", "--image-model", "x", "--replicas", "2"], "a server of its own"),
        (
            ["--model", "demo", "--image-model", "x", "--image-memory", "900GB"],
            "900.00 GB are to be kept for the image model",
        ),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(flags: list[str], message: str) -> None:
    done = subprocess.run([FUSERVE, "serve", *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_image_model_will_take_is_kept_for_it(tmp_path: Path) -> None:
    small_sd(tmp_path)
    folder = tmp_path / "model"
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    settings = ImageSettings(str(folder), ("x",), DiffusionOptions())
    assert stored < reserved_bytes(settings) < 10 * stored + 10**9
    bounded = replace(settings, options=DiffusionOptions(memory_bytes=4 * 10**9))
    assert reserved_bytes(bounded) == 4 * 10**9
