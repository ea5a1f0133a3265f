"""RequestStream: a request's updates, from the engine's thread to whoever awaits them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from fuserve.errors import FuserveError

Waiter = asyncio.Future[None]


class Update(Protocol):
    """News of a request; the last one has an output."""

    @property
    def request_id(self) -> str:
        """Of the request."""
        ...

    @property
    def output(self) -> object | None:
        """What came of the request, None while there is more to come."""
        ...


Kind = TypeVar("Kind", bound=Update)


class Mailbox(Generic[Kind]):
    """Updates on their way from the engine's thread to one reader on an event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._updates: deque[Kind] = deque()
        self._error: FuserveError | None = None
        self._waiter: Waiter | None = None

    def put(self, update: Kind) -> Waiter | None:
        """Add an update; return the reader to be woken, if one waits."""
        with self._lock:
            self._updates.append(update)
            return self._take_waiter()

    def fail(self, error: FuserveError) -> Waiter | None:
        """No more updates will come; return the reader to be woken, if one waits."""
        with self._lock:
            self._error = error
            return self._take_waiter()

    async def get(self) -> Kind:
        """The next update, as soon as there is one.

        Raises:
            FuserveError: none will come any more.
        """
        while True:
            with self._lock:
                if self._updates:
                    return self._updates.popleft()
                if self._error is not None:
                    raise self._error
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter

    def _take_waiter(self) -> Waiter | None:
        waiter, self._waiter = self._waiter, None
        return waiter


def wake(waiters: Iterable[Waiter | None]) -> None:
    """Wake readers from another thread, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        if waiter is not None:
            by_loop.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_resolve, group)


def _resolve(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        if not waiter.done():  # a cancelled reader
            waiter.set_result(None)


class RequestStream(AsyncIterator[Kind], Generic[Kind]):
    """The updates of one request; the last one has its ``output``.

    One task reads it. Closing or dropping it, or cancelling the task that waits for the next
    update, aborts the request.
    """

    def __init__(
        self, request_id: str, mailbox: Mailbox[Kind], abort: Callable[[str], None]
    ) -> None:
        self.request_id = request_id
        self._mailbox = mailbox
        self._abort = abort
        self._ended = False

    def __aiter__(self) -> RequestStream[Kind]:
        return self

    async def __anext__(self) -> Kind:
        """The next update.

        Raises:
            EngineStoppedError: the engine's thread has died.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            update = await self._mailbox.get()
        except BaseException:
            self._close()
            raise
        self._ended = update.output is not None
        return update

    async def aclose(self) -> None:
        """Abort the request if it has not ended."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort(self.request_id)
