"""Served: all that one server serves, as operators and the server's end see it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fuserve.engine.engine_thread import EngineHealth
from fuserve.server.context import ServerContext
from fuserve.server.errors import ApiError
from fuserve.server.images.context import ImageContext
from fuserve.server.metrics import ServerMetrics


@dataclass(slots=True)
class Served:
    """A language model, an image model, or both, and whether the server is leaving.

    Attributes:
        draining: no new requests are taken; ``/ready`` says so.
    """

    text: ServerContext | None
    images: ImageContext | None
    metrics: ServerMetrics
    draining: bool = False

    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        num_text = 0 if self.text is None else self.text.engine.stats().num_running
        return num_text + (0 if self.images is None else self.images.engine.stats().num_running)

    async def drain(self, grace_s: float) -> None:
        """Let what runs end; what outlasts ``grace_s`` seconds ends with an error."""
        engines = [part.engine for part in (self.text, self.images) if part is not None]
        await asyncio.gather(*(engine.drain(grace_s) for engine in engines))

    def health(self) -> EngineHealth:
        """Whether all engines live and get on."""
        return self._worst(ready=False)

    def readiness(self) -> EngineHealth:
        """Whether all engines take new requests."""
        return self._worst(ready=True)

    def models(self) -> list[dict[str, Any]]:
        """The entries of ``/v1/models``; the language model's names come first."""
        entries = []
        if self.text is not None:
            model = self.text.model
            limit = {"max_model_len": model.max_model_len}
            entries += [
                _entry(name, model.name, model.created, "generate", **limit) for name in model.names
            ]
        if self.images is not None:
            images = self.images
            entries += [
                _entry(name, images.name, images.created, "text-to-image") for name in images.names
            ]
        return entries

    def model(self, name: str) -> dict[str, Any]:
        """The entry of one name.

        Raises:
            ApiError: 404, there is none.
        """
        entries = {entry["id"]: entry for entry in self.models()}
        if name not in entries:
            raise ApiError(
                404,
                f"The model {name!r} does not exist. This server has: {', '.join(entries)}.",
                param="model",
                code="model_not_found",
            )
        return entries[name]

    def _worst(self, *, ready: bool) -> EngineHealth:
        states = []
        if self.text is not None:
            engine = self.text.engine
            states.append(engine.readiness() if ready else engine.health())
        if self.images is not None:
            states.append(self.images.engine.health())
        return next((state for state in states if not state.ok), EngineHealth(True))


def _entry(name: str, root: str, created: int, task: str, **more: Any) -> dict[str, Any]:
    """One model; ``task`` is ours."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "fuserve",
        "root": root,
        "task": task,
        **more,
    }
