"""``fuserve serve --image-model``: the command from the shell to a picture."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.pipeline import ImageTask
from fuserve.parallel.images.options import ImageParallelOptions
from fuserve.server.images.build import ImageSettings, reserved_bytes
from fuserve.server.images.pictures import png_base64
from tests.diffusion.model_folders import small_sd
from tests.parallel.small_groups import until
from tests.server.serving import WAIT_S

FUSERVE = str(Path(sys.executable).with_name("fuserve"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of random weights."""
    path = tmp_path_factory.mktemp("sd")
    small_sd(path)
    return path / "model"


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[psutil.Process, str]]:
    """The command, and its address; in the end it exits with 0 and leaves no process behind."""
    command = [FUSERVE, "serve", "--image-model", str(folder), "--port", "0"]
    command += ["--served-image-model-name", "tiny", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            (line,) = (line for line in [process.stderr.readline()] if "tiny is served at" in line)
            seen = psutil.Process(process.pid)
            yield seen, line.split(" is served at ")[1].split("/v1")[0]
            children = seen.children(recursive=True)
            process.terminate()
            assert process.wait(60) == 0
            assert not [child for child in children if child.is_running()]
        finally:
            process.kill()


def paint(url: str, **fields: Any) -> httpx2.Response:
    body = {"model": "tiny", "prompt": "a red circle", "steps": 2, "seed": 1, **fields}
    return httpx2.post(f"{url}/v1/images/generations", json=body, timeout=WAIT_S)


def picture(answer: httpx2.Response) -> str:
    assert answer.status_code == 200
    (data,) = answer.json()["data"]
    return str(data["b64_json"])


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """The picture of ``paint``, by this process alone."""
    params = ImageParams(steps=2)
    return png_base64(
        ImageTask(DiffusionModel.load(folder), ["a red circle"], [1], params).run()[0]
    )


@pytest.mark.parametrize(
    ("flags", "num_children"),
    [([], 0), (["--image-cfg-parallel", "2"], 1), (["--image-patch-parallel", "2"], 1)],
    ids=["alone", "cfg", "patch"],
)
def test_an_image_model_is_served_alone_and_over_processes(
    flags: list[str], num_children: int, folder: Path, expected: str
) -> None:
    with served(folder, *flags) as (process, url):
        assert len(process.children(recursive=True)) == num_children
        assert picture(paint(url)) == expected


def has_stepped(url: str) -> bool:
    time.sleep(0.25)  # the painting gives way to who asks
    metrics = httpx2.get(f"{url}/metrics").text
    return re.search(r"image_step_time_seconds_count.*denoise.* [1-9]", metrics) is not None


def test_a_rank_that_dies_ends_what_is_painted_and_starts_again(
    folder: Path, expected: str
) -> None:
    with (
        served(folder, "--image-cfg-parallel", "2") as (process, url),
        ThreadPoolExecutor(1) as pool,
    ):
        (rank,) = process.children(recursive=True)
        painting = pool.submit(paint, url, steps=900, size="128x128")
        until(lambda: has_stepped(url), "no step")
        rank.kill()
        answer = painting.result()
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert f"rank 1 (process {rank.pid}) was killed" in answer.json()["error"]["message"]
        assert picture(paint(url)) == expected
        (again,) = process.children(recursive=True)
        assert again.pid != rank.pid


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to serve: give --model, --image-model, or both"),
        (["--image-model", "/nowhere"], "/nowhere"),
        (["--image-model", "x", "--image-memory", "much"], "--image-memory"),
        (["--image-model", "x", "--image-cfg-parallel", "3"], "--image-cfg-parallel"),
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


def test_what_the_image_model_will_take_is_kept_for_it(folder: Path) -> None:
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    settings = ImageSettings(str(folder), ("x",), DiffusionOptions(), ImageParallelOptions())
    assert stored < reserved_bytes(settings) < 10 * stored + 10**9
    bounded = replace(settings, options=DiffusionOptions(memory_bytes=4 * 10**9))
    assert reserved_bytes(bounded) == 4 * 10**9
    for one in (settings, bounded):  # every process may take as much
        several = replace(one, parallel=ImageParallelOptions(cfg_parallel=2, patch_parallel=3))
        assert reserved_bytes(several) == 6 * reserved_bytes(one)
