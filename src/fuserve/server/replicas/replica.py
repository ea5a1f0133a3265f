"""One replica: an engine and the whole application, in an actor of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from starlette.types import Message, Scope

from fuserve.decoder import load_model
from fuserve.errors import EngineStoppedError
from fuserve.server.build import ServeSettings, build_app
from fuserve.server.logs import configure_logging
from fuserve.server.replicas.messages import ForwardedRequest
from fuserve.server.served import Served


class Replica:
    """Loads the model; answers what the door forwards.

    Args:
        settings: of the engine and the application, which are those of a single server.
    """

    def __init__(self, settings: ServeSettings) -> None:
        configure_logging(settings.log_level)
        self._loaded = load_model(
            settings.model, settings.options, memory_share=settings.memory_share
        )
        self._app = build_app(self._loaded, settings)
        self._served: Served = self._app.state.served

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """The application's ASGI messages, as many at once as there are.

        When the generator is closed, as the client has gone away, the application is told so.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(_scope(request), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            is_open = True
            while is_open:
                several = [await messages.get()]
                while not messages.empty():
                    several.append(messages.get_nowait())
                is_open = None not in several
                if ready := [message for message in several if message is not None]:
                    yield ready
            await task
        finally:
            gone.set()
            await asyncio.gather(task, return_exceptions=True)

    async def metrics(self) -> tuple[str, bytes]:
        """Its name, and its metrics in Prometheus' text format."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, self._served.metrics.exposition()

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds; a replica that fails is replaced.

        Raises:
            EngineStoppedError: the engine's thread has died, or a step does not end.
        """
        state = self._served.health()
        if not state.ok:
            raise EngineStoppedError(f"the engine has failed: {state.reason}")


def _scope(request: ForwardedRequest) -> Scope:
    state: dict[str, Any] = {}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": request.client,
        "server": None,
        "state": state,
    }
