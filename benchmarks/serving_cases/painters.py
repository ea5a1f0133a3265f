"""Clients that have pictures painted, and note when each of its steps was told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

import httpx2

from fuserve.loadgen.client import clock_s

from .servers import RunningServer

TIMEOUT_S = 1200.0
IDLE_S, POLL_S = 60.0, 0.02
IMAGE_MODEL = "bench-images"


@dataclass(frozen=True)
class Picture:
    """What is asked for."""

    side: int
    steps: int
    seed: int
    cache_interval: int = 1


@dataclass
class Painting:
    """How one went: the client's clock at each step that the server told of."""

    picture: Picture
    begun_s: float
    step_s: list[float] = field(default_factory=list)
    done_s: float | None = None

    def progress(self, at_s: float) -> float:
        """Part of the steps that were told by then."""
        return sum(step_s <= at_s for step_s in self.step_s) / self.picture.steps


async def paint(server: RunningServer, picture: Picture, *, leave_after: int = 0) -> Painting:
    """Stream one picture; with ``leave_after`` the connection is closed after so many steps.

    Raises:
        SystemExit: the server did not finish it.
    """
    body = {
        "model": IMAGE_MODEL,
        "prompt": "a red circle above a blue square",
        "size": f"{picture.side}x{picture.side}",
        "steps": picture.steps,
        "seed": picture.seed,
        "cache_interval": picture.cache_interval,
        "stream": True,
        "partial_images": min(picture.steps, 100),
    }
    painting = Painting(picture, clock_s())
    async with (
        httpx2.AsyncClient(base_url=server.base_url, timeout=TIMEOUT_S, trust_env=False) as http,
        http.stream("POST", "/v1/images/generations", json=body) as answer,
    ):
        if answer.status_code != httpx2.codes.OK:
            raise SystemExit(f"a picture was refused: {(await answer.aread()).decode()}")
        async for event in httpx2.EventSource(answer):
            told = json.loads(event.data)
            painting.step_s.append(clock_s())
            if told.get("type", "").endswith(".completed"):
                painting.done_s = clock_s()
            if leave_after and len(painting.step_s) >= leave_after:
                return painting
    if painting.done_s is None:
        raise SystemExit("a picture was not finished")
    return painting


async def paint_all(server: RunningServer, pictures: list[Picture]) -> list[Painting]:
    """All of them at once."""
    return list(await asyncio.gather(*(paint(server, picture) for picture in pictures)))


async def seconds_until_free(server: RunningServer) -> float:
    """How long the server takes to hold nothing for pictures any more.

    Raises:
        SystemExit: it still does after a minute.
    """
    begun_s = clock_s()
    while clock_s() - begun_s < IDLE_S:
        metrics = await asyncio.to_thread(server.metrics)
        names = ("num_image_requests_running", "num_image_requests_waiting", "image_requests_bytes")
        if not any(metrics["fuserve:" + name, ""] for name in names):
            return clock_s() - begun_s
        await asyncio.sleep(POLL_S)
    raise SystemExit("the server holds memory for pictures that nobody waits for")
