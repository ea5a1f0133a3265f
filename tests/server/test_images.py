"""``/v1/images`` as OpenAI's client sees it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from fuserve.diffusion.image_file import to_pixels
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask
from fuserve.diffusion.prompts import MAX_PROMPT_CHARACTERS
from fuserve.errors import CapacityError
from fuserve.server.config import ServerConfig
from fuserve.server.images.pictures import png_base64
from tests.engine.images.fake_model import FakeDenoiser, FakeImageModel, Gate
from tests.server.imaging import NAME, ImageServer, pixels, png, serving_images
from tests.server.serving import WAIT_S


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with serving_images(FakeImageModel()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ImageServer) -> OpenAI:
    return server.client()


def painted(prompt: str, seed: int, **params: Any) -> np.ndarray:
    image = ImageTask(FakeImageModel(), [prompt], [seed], ImageParams(**params)).run()[0]
    return to_pixels(image)


def test_pixels_are_rounded_as_in_a_saved_file() -> None:
    halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    image = np.repeat(halves[None, :, None], 3, axis=2)
    assert np.array_equal(pixels(png_base64(image)), to_pixels(image))


def test_pictures_are_those_of_the_pipeline_with_the_same_seeds(client: OpenAI) -> None:
    ours = {"seed": 7, "steps": 3, "negative_prompt": "blur", "guidance_scale": 5.0}
    answer = client.images.generate(
        model=NAME,
        prompt="a red circle",
        n=2,
        size="96x64",
        response_format="b64_json",
        extra_body=ours,
    )
    assert answer.data is not None
    for number, image in enumerate(answer.data):
        wanted = painted(
            "a red circle",
            7 + number,
            steps=3,
            negative_prompt="blur",
            guidance_scale=5.0,
            width=96,
            height=64,
        )
        assert np.array_equal(pixels(image.b64_json), wanted)
    assert (answer.size, answer.output_format, answer.background) == ("96x64", "png", "opaque")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 2 * 12 * 8)
    assert answer.usage.total_tokens == 5 + 2 * 12 * 8


def test_a_drawn_seed_is_told_and_repeats_the_picture(client: OpenAI) -> None:
    first = client.images.generate(prompt="x", extra_body={"steps": 2}).data
    assert first is not None
    seed = first[0].seed  # type: ignore[attr-defined]
    again = client.images.generate(prompt="x", extra_body={"steps": 2, "seed": seed}).data
    assert again is not None
    assert again[0].b64_json == first[0].b64_json


def test_a_stream_previews_and_then_completes_each_picture(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt="a red circle",
        n=2,
        stream=True,
        partial_images=2,
        extra_body={"steps": 6, "seed": 1},
    )
    events = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"] * 2
    assert [event.partial_image_index for event in events if hasattr(event, "partial_image_index")]
    steps = [event.step for event in events]  # type: ignore[union-attr]
    assert steps == [2, 4, 6] * 2
    last: Any = events[-1]
    assert np.array_equal(pixels(last.b64_json), painted("a red circle", 2, steps=6))
    assert pixels(events[0].b64_json).shape == (8, 8, 3)
    assert (last.size, last.image_index, last.usage.output_tokens) == ("64x64", 1, 64)


def test_an_image_is_edited_where_the_mask_is_transparent(client: OpenAI) -> None:
    image = np.zeros((64, 64, 3))
    image[..., 0] = 200
    mask = np.zeros((64, 64, 4))
    mask[:, :32, 3] = 255  # the left half stays
    answer = client.images.edit(
        model=NAME,
        image=("image.png", png(image), "image/png"),
        mask=("mask.png", png(mask), "image/png"),
        prompt="a blue square",
        extra_body={"seed": 3, "steps": 4},
    )
    assert answer.data is not None
    edited = pixels(answer.data[0].b64_json)
    assert np.abs(edited[:, :32].astype(int) - image[:, :32]).max() <= 2
    assert np.abs(edited[:, 32:].astype(int) - image[:, 32:]).max() > 20


def test_an_edit_without_a_mask_follows_its_strength_and_streams(client: OpenAI) -> None:
    image = png(np.full((70, 64, 3), 120))

    def edited(strength: float) -> np.ndarray:
        events = list(
            client.images.edit(
                image=image,
                prompt="x",
                stream=True,
                extra_body={"seed": 1, "steps": 10, "strength": strength},
            )
        )
        assert [event.type for event in events] == ["image_edit.completed"]
        return pixels(events[0].b64_json).astype(int)

    slight, strong = edited(0.2), edited(1.0)
    assert slight.shape == (72, 64, 3)  # the nearest size that the model can do
    assert np.abs(slight - 120).mean() < np.abs(strong - 120).mean()


def header_only(width: int, height: int) -> bytes:
    """The head of a PNG, of pixels that do not follow."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + checksum + b"\0\0\0\x01IDAT"


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}),
        ("negative_prompt", {"negative_prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}),
        ("size", {"size": "big"}),
        ("size", {"size": "99999x99999"}),
        ("size", {"size": "60x64"}),
        ("n", {"n": 11}),
        ("response_format", {"response_format": "url"}),
        ("output_format", {"output_format": "webp"}),
        ("background", {"background": "transparent"}),
        ("steps", {"steps": 0}),
        ("guidance_scale", {"guidance_scale": -1.0}),
        ("seed", {"seed": -1}),
        ("scheduler", {"scheduler": "nonsense"}),
        ("cache_interval", {"cache_interval": 0}),
        ("cache_branch", {"cache_interval": 2, "cache_branch": 1}),
        ("stepz", {"stepz": 3}),
    ],
)
def test_what_is_wrong_is_named(client: OpenAI, param: str, given: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.images.generate(**{"prompt": "x", "extra_body": given})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("image", {"image": b"no picture"}),
        ("image", {"image": header_only(30_000, 30_000)}),
        ("image", {"image": png(np.zeros((1, 3_000_000)))}),  # 8 rows of it are too many pixels
        ("image", {"image": png(np.zeros((1, 8200)))}),
        ("size", {"size": "8200x8"}),
        ("mask", {"mask": png(np.zeros((8, 8, 4)))}),
        ("strength", {"extra_body": {"strength": "2"}}),
        ("image", {"image": [png(np.zeros((64, 64, 3)))] * 2}),
    ],
)
def test_what_is_wrong_with_an_edit_is_named(
    client: OpenAI, param: str, given: dict[str, Any]
) -> None:
    usual = {"image": png(np.zeros((64, 64, 3))), "prompt": "x"}
    with pytest.raises(BadRequestError) as caught:
        client.images.edit(**{**usual, **given})
    assert caught.value.param == param


def test_a_picture_too_large_for_the_memory_is_a_matter_of_its_size() -> None:
    class Small(FakeImageModel):
        def denoiser(self, *args: Any, **named: Any) -> FakeDenoiser:
            raise CapacityError("A picture of this size takes 9 GB.")

    with serving_images(Small()) as server:
        client = server.client()
        with pytest.raises(BadRequestError, match="9 GB") as caught:
            client.images.generate(prompt="x")
        assert (caught.value.param, caught.value.code) == ("size", None)


def test_a_scheduler_that_the_models_config_does_not_fit_is_named() -> None:
    class Learned(FakeImageModel):
        scheduler_config = FakeImageModel.scheduler_config | {"variance_type": "learned"}

    with serving_images(Learned()) as server:
        client = server.client()
        assert client.images.generate(prompt="x", extra_body={"steps": 1}).data
        with pytest.raises(BadRequestError, match="variance_type") as caught:
            client.images.generate(prompt="x", extra_body={"scheduler": "dpm++2m"})
        assert caught.value.param == "scheduler"


def test_another_model_is_not_found_and_ours_is_listed(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-3")
    assert caught.value.param == "model"
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).task == "text-to-image"  # type: ignore[attr-defined]
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model=NAME, messages=[])


def test_prompts_are_counted_beside_the_event_loop(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, threads = FakeImageModel.count_tokens, set()

    def noting(self: FakeImageModel, prompt: str) -> int:
        threads.add(threading.current_thread().name.split("_")[0])
        return count(self, prompt)

    monkeypatch.setattr(FakeImageModel, "count_tokens", noting)
    client.images.generate(prompt="x", extra_body={"steps": 1})
    assert threads == {"fuserve-worker", "fuserve-images"}


def test_a_form_is_asked_for_where_json_comes(server: ImageServer) -> None:
    answer = httpx2.post(f"{server.url}/v1/images/edits", json={"prompt": "x"})
    assert answer.status_code == 415
    assert "multipart" in answer.json()["error"]["message"]


def running(server: ImageServer) -> int:
    return server.engine.stats().num_running


def until(condition: Any) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_ends_its_request(streams: bool) -> None:
    gate = Gate()
    with serving_images(FakeImageModel(gate)) as server:
        body = {"prompt": "x", "steps": 50, "stream": streams, "partial_images": 40}
        if not streams:
            del body["partial_images"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            client = httpx2.Client(timeout=WAIT_S if streams else 0.2)

            def read() -> None:
                url = f"{server.url}/v1/images/generations"
                with client.stream("POST", url, json=body) as answer:
                    next(answer.iter_bytes())

            reading = pool.submit(read)
            gate.wait_for_step()
            if streams:
                gate.allowed.release(3)
                reading.result()
            else:
                assert isinstance(reading.exception(), httpx2.TimeoutException)
            client.close()
            until(lambda: server.engine._thread._aborts)
            gate.open()
            until(lambda: running(server) == 0)
            assert len(gate.steps) < 50


def test_more_than_may_wait_is_told_to_come_back() -> None:
    gate = Gate()
    with serving_images(FakeImageModel(gate), max_running=1, max_queue_requests=1) as server:
        client = server.client()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = [pool.submit(client.images.generate, prompt="x") for _ in range(2)]
            gate.wait_for_step()
            until(lambda: server.engine.stats().num_waiting == 1)
            with pytest.raises(RateLimitError) as caught:
                client.images.generate(prompt="x")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            gate.open()
            assert all(each.result().data for each in first)


def test_a_request_that_takes_too_long_ends_alone() -> None:
    gate = Gate()
    config = ServerConfig(request_timeout_s=0.05)
    with serving_images(FakeImageModel(gate), config) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.client().images.generate, prompt="x")
            gate.wait_for_step()
            time.sleep(0.06)
            gate.open()
            error = late.exception()
        assert isinstance(error, APIStatusError)
        assert (error.status_code, error.code) == (504, "deadline_exceeded")


def test_a_failing_step_is_a_fault_of_the_server_and_it_lives_on() -> None:
    def fail(prompt: str) -> None:
        if prompt == "bad":
            raise ValueError("boom")

    with serving_images(FakeImageModel(fail)) as server:
        client = server.client()
        with pytest.raises(APIStatusError) as caught:
            client.images.generate(prompt="bad")
        assert caught.value.status_code == 500
        assert client.images.generate(prompt="good").data
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_metrics_tell_of_steps_queue_pictures_and_prompts_found() -> None:
    with serving_images(FakeImageModel()) as server:
        client = server.client()
        for _ in range(2):
            client.images.generate(prompt="x", n=2, extra_body={"steps": 3})
        text = httpx2.get(f"{server.url}/metrics").text

    def value(name: str, labels: str = "") -> float:
        found = re.search(rf'^fuserve:{name}{{{labels}model_name="{NAME}".*}} (.*)$', text, re.M)
        assert found is not None, name
        return float(found[1])

    assert value("images_generated_total") == 4
    assert value("num_image_requests_running") == value("num_image_requests_waiting") == 0
    # Each picture looks up its prompt and the negative one.
    assert value("image_prompt_cache_queries_total") == 8
    assert value("image_prompt_cache_hits_total") == 6
    assert value("image_request_queue_time_seconds_count") == 2
    assert value("image_request_success_total", 'finished_reason="stop",') == 2
    assert value("image_step_time_seconds_count", 'kind="denoise",') == 12
    assert value("image_step_time_seconds_count", 'kind="decode",') == 4


def test_draining_lets_pictures_be_finished() -> None:
    gate = Gate()
    with serving_images(FakeImageModel(gate)) as server:
        client = server.client()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            last = pool.submit(client.images.generate, prompt="x")
            gate.wait_for_step()
            draining = pool.submit(asyncio.run, server.engine.drain(WAIT_S))
            until(lambda: server.engine._thread._draining)
            gate.open()
            draining.result()
            assert last.result().data
        with pytest.raises(APIStatusError) as caught:
            client.images.generate(prompt="x")
        assert caught.value.status_code == 503
