"""Requests for pictures share the model step by step."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask
from fuserve.engine.images.preview import Previews
from fuserve.engine.images.request import ImageRequest, ImageUpdate
from fuserve.engine.images.step_loop import StepLoop
from fuserve.errors import DeadlineError, RankFailedError, RequestFailedError
from tests.engine.images.fake_model import FACTOR, FakeImageModel


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: str, **changes: Any) -> ImageRequest:
    given = {"seeds": (1,), "num_previews": 0, "client": "", "deadline_s": None}
    given |= {key: changes.pop(key) for key in list(given) if key in changes}
    params = ImageParams(**{"steps": 4, **changes})
    return ImageRequest(name, name, params, arrival_s=0.0, **given)


def run(loop: StepLoop, requests: list[ImageRequest]) -> dict[str, list[ImageUpdate]]:
    for each in requests:
        loop.enqueue(each)
    updates: dict[str, list[ImageUpdate]] = {each.request_id: [] for each in requests}
    while loop.has_unfinished:
        for update in loop.step():
            updates[update.request_id].append(update)
    return updates


def output(updates: list[ImageUpdate]) -> Any:
    assert updates[-1].output is not None
    return updates[-1].output


def test_a_request_paints_what_the_pipeline_does_whatever_runs_beside() -> None:
    model = FakeImageModel()
    requests = [
        request("a", seeds=(7, 8), width=128, height=64),
        request("b", seeds=(9,), guidance_scale=1.0),
    ]
    updates = run(StepLoop(model, max_running=8), requests)
    for each in requests:
        pictures = [update for update in updates[each.request_id] if update.image is not None]
        assert [picture.seed for picture in pictures] == list(each.seeds)
        for picture, seed in zip(pictures, each.seeds, strict=True):
            alone = ImageTask(FakeImageModel(), [each.prompt], [seed], each.params).run()[0]
            assert picture.image is not None
            assert np.array_equal(picture.image, alone)
        assert output(updates[each.request_id]).finish_reason == "stop"
    assert output(updates["a"]).num_latents == 2 * 16 * 8


def test_small_pictures_take_more_steps_than_large_ones_in_the_same_time() -> None:
    taken: list[str] = []
    loop = StepLoop(FakeImageModel(taken.append), max_running=8)
    sizes = {f"small{i}": 64 for i in range(4)} | {f"large{i}": 128 for i in range(4)}
    run(loop, [request(name, width=side, height=side, steps=16) for name, side in sizes.items()])
    assert Counter(taken) == dict.fromkeys(sizes, 16)
    # At any time no two have had work that differs by more than one step of the large ones.
    last_small = max(i for i, name in enumerate(taken) if name.startswith("small"))
    work: Counter[str] = Counter(dict.fromkeys(sizes, 0))
    for name in taken[: last_small - 4]:
        work[name] += sizes[name] ** 2
        assert max(work.values()) - min(work.values()) <= 128**2
    assert sum(work[name] for name in sizes if name.startswith("large")) >= 4 * 3 * 128**2


def test_a_cheap_step_counts_as_little_as_it_costs() -> None:
    taken: list[str] = []
    model = FakeImageModel(taken.append)
    model.cheap_prompts = {"cached"}
    loop = StepLoop(model, max_running=8)
    run(loop, [request("cached", steps=32), request("full", steps=32)])
    # Of four steps three cost a quarter, so 16 steps of the other take as long as 36.
    assert taken[:40].count("cached") in range(26, 31)
    kinds: Counter[str] = Counter()

    class Observer:
        def on_step(self, kind: str, seconds: float) -> None:
            kinds[kind] += 1

        def on_finished(self, output: Any) -> None: ...

    run(StepLoop(model, max_running=1, observer=Observer()), [request("cached", steps=8)])
    assert kinds == {"prepare": 1, "denoise": 2, "cached": 6, "decode": 1}


def test_a_newcomer_starts_level_and_holds_nobody_up() -> None:
    taken: list[str] = []
    loop = StepLoop(FakeImageModel(taken.append), max_running=8)
    loop.enqueue(request("old", steps=40))
    for _ in range(21):  # one of them prepares
        loop.step()
    loop.enqueue(request("new", steps=20))
    while loop.has_unfinished:
        loop.step()
    assert taken[20:30].count("old") in (4, 5, 6)


def test_clients_share_before_their_requests_do() -> None:
    taken: list[str] = []
    loop = StepLoop(FakeImageModel(taken.append), max_running=8)
    many = [request(f"many{i}", client="many", steps=10) for i in range(5)]
    run(loop, [*many, request("single", client="one", steps=10)])
    assert taken[:20].count("single") == 10


def test_only_so_many_run_and_a_waiting_client_comes_before_one_that_had_much() -> None:
    loop = StepLoop(FakeImageModel(), max_running=1)
    for name, client in (("a", "x"), ("b", "x"), ("c", "y")):
        loop.enqueue(request(name, client=client))
    ended = []
    while loop.has_unfinished:
        assert loop.num_running <= 1
        ended += [update.request_id for update in loop.step() if update.output is not None]
    assert ended == ["a", "c", "b"]


def test_an_aborted_request_frees_its_latents_at_once() -> None:
    loop = StepLoop(FakeImageModel(), max_running=8)
    loop.enqueue(request("a"))
    loop.step()
    loop.step()
    latents = weakref.ref(loop._running["a"]._task.latents)  # type: ignore[arg-type]
    assert latents() is not None
    assert loop.num_bytes > 0
    (update,) = loop.abort("a")
    assert output([update]).finish_reason == "abort"
    assert latents() is None
    assert loop.num_bytes == 0
    assert not loop.has_unfinished
    assert loop.abort("a") == []


def test_a_failing_request_hurts_no_other() -> None:
    def fail(prompt: str) -> None:
        if prompt == "bad":
            raise ValueError("boom")

    updates = run(StepLoop(FakeImageModel(fail), max_running=8), [request("bad"), request("good")])
    failed = output(updates["bad"])
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, RequestFailedError)
    assert "boom" in str(failed.error)
    assert output(updates["good"]).num_images == 1


def test_a_rank_that_has_failed_is_told_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    def fail(prompt: str) -> None:
        raise RankFailedError("rank 1 was killed")

    updates = run(StepLoop(FakeImageModel(fail), max_running=1), [request("a")])
    assert isinstance(output(updates["a"]).error, RankFailedError)
    (record,) = caplog.records
    assert (record.message, record.exc_info) == ("rank 1 was killed", None)


@pytest.mark.parametrize("begun", [True, False])
def test_a_deadline_ends_a_request_that_runs_or_waits(begun: bool) -> None:
    clock = Clock()
    loop = StepLoop(FakeImageModel(), max_running=1, clock=clock)
    if not begun:
        loop.enqueue(request("before"))
    loop.enqueue(request("late", deadline_s=5.0))
    loop.step()
    clock.now = 5.0
    ended = [update.output for update in loop.step() if update.request_id == "late"]
    assert ended[0] is not None
    assert isinstance(ended[0].error, DeadlineError)
    assert loop.num_running == (0 if begun else 1)


@pytest.mark.parametrize(("wanted", "steps"), [(0, 4), (2, 10), (3, 4), (100, 5)])
def test_as_many_previews_come_as_were_asked_for_evenly(wanted: int, steps: int) -> None:
    loop = StepLoop(FakeImageModel(), max_running=1)
    updates = run(loop, [request("a", steps=steps, num_previews=wanted)])["a"]
    at = [update.step for update in updates if update.preview is not None]
    assert len(at) == min(wanted, steps - 1)
    gaps = np.diff([0, *at, steps])
    assert gaps.max() - gaps.min() <= 1


def test_a_preview_has_the_colours_of_the_decoded_picture() -> None:
    model = FakeImageModel()
    latents = np.random.default_rng(1).standard_normal((6, 8, 4)).astype(np.float32)
    previews = Previews(model)
    preview = previews.picture(latents)
    previews.picture(latents)
    assert model.num_decodes == 1  # the sample, once
    decoded = model.decode(latents[None])[0]
    assert preview.shape == (6, 8, 3)
    assert np.abs(preview - decoded[::FACTOR, ::FACTOR]).max() < 0.02
