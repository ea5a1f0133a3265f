"""The image engine's thread."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

from fuserve.diffusion.image_params import ImageParams
from fuserve.engine.images.engine import ImageEngine
from fuserve.errors import InvalidRequestError, ModelNotFoundError
from tests.engine.images.fake_model import FakeImageModel, Gate


def test_an_error_of_loading_reaches_whoever_starts_it() -> None:
    def load() -> FakeImageModel:
        raise ModelNotFoundError("no such model")

    engine = ImageEngine(load)
    with pytest.raises(ModelNotFoundError):
        engine.start()
    assert not engine.health().ok


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_the_model_and_its_steps_give_way_to_other_threads() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []

    def note() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def load() -> FakeImageModel:
        team = threading.Thread(target=note)  # as a model's pool of threads
        team.start()
        team.join()
        return FakeImageModel(lambda prompt: note())

    async def paint() -> None:
        engine = ImageEngine(load)
        engine.start()
        async for _ in engine.submit("x", ImageParams(steps=1)):
            pass
        await engine.drain(5)

    asyncio.run(paint())
    assert found == [min(own + 10, 19)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_working_memory_is_given_back_once_nothing_is_left_to_do() -> None:
    gate = Gate()
    model = FakeImageModel(gate)
    at_steps: list[int] = []

    def noting(prompt: str) -> None:
        gate(prompt)
        at_steps.append(model.num_releases)

    model.before_step = noting

    async def paint() -> None:
        engine = ImageEngine(lambda: model)
        engine.start()
        streams = [engine.submit("x", ImageParams(steps=steps)) for steps in (1, 4)]
        gate.open()
        for stream in streams:
            async for _ in stream:
                pass
        await engine.drain(5)

    asyncio.run(paint())
    assert at_steps == [0] * 5
    assert model.num_releases == 1


@pytest.mark.parametrize("dies", [False, True])
def test_the_end_of_the_engine_is_the_models(dies: bool) -> None:
    class Model(FakeImageModel):
        def release(self) -> None:
            if dies:
                raise ValueError("boom")

    model = Model()

    async def paint() -> None:
        engine = ImageEngine(lambda: model)
        engine.start()
        async for _ in engine.submit("x", ImageParams(steps=1)):
            pass
        await engine.drain(5)
        assert "has died" in engine.health().reason or not dies
        engine._thread._thread.join()

    asyncio.run(paint())
    assert model.num_closes == 1


def test_what_could_never_be_painted_is_refused_at_once() -> None:
    engine = ImageEngine(FakeImageModel)
    engine.start()
    with pytest.raises(InvalidRequestError, match="multiple of 8"):
        engine.submit("x", ImageParams(width=60))
    asyncio.run(engine.drain(0))
