"""Running the server: starting it, and leaving without cutting anybody off."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from fuserve.errors import InvalidRequestError
from fuserve.server.logs import log_event

_FLUSH_S = 5
"""For answers that are complete to reach slow readers."""


class Drainable(Protocol):
    """What the server stops: ``draining`` is set first, so that nothing new is taken."""

    draining: bool

    def num_running(self) -> int:
        """Requests that have not ended."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Let what runs end, and end what outlasts ``grace_s`` seconds."""
        ...


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: not ready, nothing new, what runs may end, then exit with 0.

    A second signal exits at once.

    Args:
        config: uvicorn's.
        served: what is behind the application.
        grace_s: how long running requests may take.
        ready: called when requests are taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        served: Drainable,
        grace_s: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._served = served
        self._grace_s = grace_s
        self._ready = ready
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            # What has been made so far stays: the collector need not look through it again, which
            # would hold up every stream for some tens of milliseconds.
            gc.collect()
            gc.freeze()
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal. uvicorn would end by the signal, not with 0."""
        if self._served.draining:
            self.force_exit = self.should_exit = True
        else:
            self._served.draining = True
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        running = self._served.num_running()
        log_event(logging.INFO, "draining", num_running=running, grace_s=self._grace_s)
        try:
            await self._served.drain(self._grace_s)
        finally:
            self.should_exit = True


def run_server(
    app: ASGIApp,
    served: Drainable,
    listener: socket.socket,
    *,
    grace_s: float,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        app: made by ``create_app``, or the door of replicas.
        served: what is behind it: the context, or the door itself.
        listener: bound; closed at the end.
        grace_s: how long running requests may take once the server is told to stop.
        ready: called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=_FLUSH_S,
    )
    server = DrainingServer(config, served, grace_s, ready)
    server.run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded, so that a taken port is told at once.

    It does not listen yet: until the server is ready, connections are refused.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        InvalidRequestError: the address cannot be bound.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidRequestError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. "
            "Choose another --host or --port."
        ) from error
    return listener
