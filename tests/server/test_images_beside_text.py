"""One server with a language model and an image model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fuserve.diffusion.image_file import to_pixels
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.pipeline import ImageTask
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.images.engine import ImageEngine
from fuserve.server.metrics import ServerMetrics
from tests.diffusion.model_folders import small_sd
from tests.engine.fake_model import FakeExecutor
from tests.engine.images.fake_model import FakeImageModel, Gate
from tests.server.imaging import NAME, images_of, pixels
from tests.server.serving import ChatByteCodec, RunningServer, serving

QUESTION: list[Any] = [{"role": "user", "content": "Hello!"}]


@contextmanager
def serving_both(model: Any) -> Iterator[tuple[RunningServer, ImageEngine]]:
    """The toy language model, and an image model with its engine."""
    codec = ChatByteCodec()
    engine = Engine(FakeExecutor(), codec, EngineConfig(1024, 8, 64))
    images = images_of(model, ServerMetrics(NAME))
    try:
        with serving(engine, codec, images=images) as server:
            yield server, images.engine
    finally:
        asyncio.run(images.engine.drain(0))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of random weights, as a folder."""
    folder = tmp_path_factory.mktemp("sd")
    small_sd(folder)
    return folder / "model"


def test_a_chat_streams_to_its_end_within_one_step_of_a_picture() -> None:
    gate = Gate()
    with serving_both(FakeImageModel(gate)) as (server, _), ThreadPoolExecutor(1) as pool:
        client = server.client()
        painting = pool.submit(client.images.generate, prompt="x")
        gate.wait_for_step()
        stream = client.chat.completions.create(
            model="toy", messages=QUESTION, max_tokens=64, stream=True
        )
        num_chunks = len([chunk for chunk in stream if chunk.choices])
        assert num_chunks > 2
        assert not painting.done()
        assert len(gate.steps) == 1
        gate.open()
        assert painting.result().data


def test_eight_requests_of_two_sizes_get_on_fairly_while_a_chat_streams(
    stable_diffusion: Path,
) -> None:
    model = DiffusionModel.load(stable_diffusion)
    multiple = model.size_multiple
    sides = [multiple * 2 if number % 2 else multiple for number in range(8)]
    progress: list[tuple[int, int, int]] = []  # number of the request, its step, of how many
    pictures: dict[int, str] = {}

    with serving_both(model) as (server, _), ThreadPoolExecutor(9) as pool:
        client = server.client()

        def paint(number: int) -> None:
            side = sides[number]
            stream = client.images.generate(
                prompt=f"picture {number}",
                size=f"{side}x{side}",  # type: ignore[call-overload]
                stream=True,
                partial_images=20,
                extra_body={
                    "seed": number,
                    "steps": 6,
                    "guidance_scale": 5.0,
                    "cache_interval": 1 + number // 4,
                },
            )
            for event in stream:
                progress.append((number, event.step, event.steps))
                pictures[number] = event.b64_json

        def chat() -> str:
            stream = client.chat.completions.create(
                model="toy", messages=QUESTION, max_tokens=64, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        painting = [pool.submit(paint, number) for number in range(8)]
        for answer in [pool.submit(chat) for _ in range(4)]:
            assert answer.result()
        for each in painting:
            each.result()

    ended = [number for number, step, steps in progress if step == steps]
    assert sorted(ended) == list(range(8))
    # Steps of a small picture are a quarter of a large one's: it is done long before.
    assert {number for number in ended[:4]} == {0, 2, 4, 6}
    alone = DiffusionModel.load(stable_diffusion)
    for number in (1, 6):  # the picture does not tell who painted beside
        side = sides[number]
        params = ImageParams(
            steps=6, guidance_scale=5.0, width=side, height=side, cache_interval=1 + number // 4
        )
        (image,) = ImageTask(alone, [f"picture {number}"], [number], params).run()
        assert (pixels(pictures[number]) == to_pixels(image)).all()


def test_eight_requests_that_nobody_waits_for_any_more_leave_no_memory_behind(
    stable_diffusion: Path,
) -> None:
    model = DiffusionModel.load(stable_diffusion)
    side = model.size_multiple
    with serving_both(model) as (server, painter), ThreadPoolExecutor(8) as pool:
        client = server.client()

        def paint_a_little(number: int) -> int:
            size = side * (1 + number % 2)
            stream = client.images.generate(
                prompt=f"picture {number}",
                size=f"{size}x{size}",  # type: ignore[call-overload]
                stream=True,
                partial_images=100,
                extra_body={"steps": 500, "cache_interval": 3},
            )
            next(iter(stream))
            held = painter.stats().num_bytes
            stream.close()
            return held

        assert min(pool.map(paint_a_little, range(8))) > 0
        stream = client.chat.completions.create(
            model="toy", messages=QUESTION, max_tokens=64, stream=True
        )
        assert len(list(stream)) > 2
        deadline_s = time.monotonic() + 60
        while painter.stats().num_running > 0 or painter.stats().num_bytes > 0:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_both_models_are_listed_and_each_knows_its_own() -> None:
    with serving_both(FakeImageModel()) as (server, _):
        client = server.client()
        listed = {model.id: model.task for model in client.models.list()}  # type: ignore[attr-defined]
        assert listed == {"toy": "generate", NAME: "text-to-image"}
        with pytest.raises(Exception, match="image model 'toy' does not exist"):
            client.images.generate(prompt="x", model="toy")
