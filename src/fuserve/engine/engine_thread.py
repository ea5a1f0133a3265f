"""EngineThread: an engine's own thread, and how all other threads reach it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fuserve.engine.request_stream import Mailbox, RequestStream, Update, wake
from fuserve.errors import EngineStoppedError, FuserveError, InvalidRequestError

_log = logging.getLogger("fuserve.engine")
_JOIN_TIMEOUT_S = 30.0


class Arrival(Protocol):
    """A request on its way to the engine."""

    @property
    def request_id(self) -> str:
        """No other open request has it."""
        ...


Request = TypeVar("Request", bound=Arrival)
Kind = TypeVar("Kind", bound=Update)
Taken = TypeVar("Taken", bound=Arrival, contravariant=True)
Told = TypeVar("Told", bound=Update, covariant=True)


class Work(Protocol[Taken, Told]):
    """What an engine does; all of it is called on the engine's thread."""

    @property
    def has_unfinished(self) -> bool:
        """There is something to do."""
        ...

    def enqueue(self, request: Taken) -> None:
        """Take a request in."""
        ...

    def abort(self, request_id: str) -> Iterable[Told]:
        """End a request, and tell of it; nothing if it has ended."""
        ...

    def abort_all(self) -> Iterable[Told]:
        """End all requests, and tell of it."""
        ...

    def step(self) -> None:
        """Do the next piece, and deliver what came of it."""
        ...

    def rest(self) -> None:
        """Nothing is left to do. The lock is held."""
        ...

    def close(self) -> None:
        """End what belongs to the work beside this process; nothing follows."""
        ...


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine's thread is alive and gets on; ``reason`` says why not."""

    ok: bool
    reason: str = ""


class EngineThread(Generic[Request, Kind]):
    """Takes requests from any thread to the engine, and its updates back to their readers.

    Args:
        begin: makes the engine's work, on the thread; what it raises ``start`` does.
        on_ended: is told the last update of each request, after its reader has been woken.
        name: of the thread.
        title: of the engine, as messages begin with it.
        stuck_after_s: a step, its delivery included, that takes longer makes ``health`` bad.
        clock: monotonic seconds.

    Attributes:
        lock: held while requests go from here into the engine, so whoever holds it sees each once.
        arrivals: requests that have not been taken in; for holders of the lock.
    """

    def __init__(
        self,
        begin: Callable[[], Work[Request, Kind]],
        on_ended: Callable[[Kind], None],
        *,
        name: str,
        title: str,
        stuck_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._begin = begin
        self._on_ended = on_ended
        self._title = title
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._begun = threading.Event()
        self._begin_error: BaseException | None = None
        self.lock = threading.Condition()
        # Of what follows.
        self.arrivals: deque[Request] = deque()
        self._aborts: deque[str] = deque()
        self._mailboxes: dict[str, Mailbox[Kind]] = {}
        self._draining = False
        self._stopping = False
        self._death: str | None = None
        self._idle = threading.Event()  # set once draining has left nothing to do
        self._turn_began_s: float | None = None  # None while there is nothing to do

    def start(self) -> None:
        """Start the thread, and wait until its work can begin. Raises what making that raises."""
        self._thread.start()
        self._begun.wait()
        if self._begin_error is not None:
            raise self._begin_error

    def check_open(self) -> None:
        """Raise if no requests are taken any more.

        Raises:
            EngineStoppedError: saying why.
        """
        if self._death is not None:
            raise EngineStoppedError(self._death)
        if self._draining:
            raise EngineStoppedError(f"{self._title} is being stopped and takes no more requests.")

    def submit(self, request: Request, admit: Callable[[], None]) -> RequestStream[Kind]:
        """Queue a request; never waits for a step.

        Args:
            request: with an id of its own.
            admit: raises if there is no place for it; called with the lock held.

        Raises:
            EngineStoppedError: the engine takes no requests any more.
            InvalidRequestError: the id is in use.
        """
        mailbox: Mailbox[Kind] = Mailbox()
        with self.lock:
            self.check_open()
            if request.request_id in self._mailboxes:
                raise InvalidRequestError(f"The request id {request.request_id!r} is in use.")
            admit()
            self._mailboxes[request.request_id] = mailbox
            self.arrivals.append(request)
            self.lock.notify()
        return RequestStream(request.request_id, mailbox, self.abort)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        # A stream's finalizer comes here, in whatever thread, even one that holds the lock: so
        # this takes none. Who waits under the lock has nothing that could be aborted, or is woken.
        self._aborts.append(request_id)
        if self.lock.acquire(blocking=False):
            try:
                self.lock.notify()
            finally:
                self.lock.release()

    def notify(self) -> None:
        """There may be something to do that came from elsewhere."""
        with self.lock:
            self.lock.notify()

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the present ones end, abort those that have not, and stop.

        Args:
            grace_s: how long to wait for them.
        """
        with self.lock:
            self._draining = True
            self.lock.notify()
        if not self._thread.is_alive():
            return
        await asyncio.to_thread(self._idle.wait, grace_s)
        with self.lock:
            self._stopping = True
            self.lock.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("%s's thread does not stop: %s", self._title, self.health().reason)

    def health(self) -> EngineHealth:
        """Whether the thread is alive and not stuck in a step."""
        if self._death is not None:
            return EngineHealth(False, self._death)
        if not self._thread.is_alive():
            return EngineHealth(False, f"{self._title}'s thread is not running.")
        began_s = self._turn_began_s
        turn_s = 0.0 if began_s is None else self._clock() - began_s
        if turn_s > self._stuck_after_s:
            return EngineHealth(False, f"{self._title} has been in one step for {turn_s:.0f} s.")
        return EngineHealth(True)

    # What follows is for the work, on the engine's thread.

    def deliver(self, updates: Iterable[Kind]) -> None:
        """Send updates to the readers of their requests."""
        ended = []
        waiters = []
        with self.lock:
            for update in updates:
                waiters.append(self._mailboxes[update.request_id].put(update))
                if update.output is not None:
                    del self._mailboxes[update.request_id]
                    ended.append(update)
        wake(waiters)
        for update in ended:
            self._on_ended(update)

    def fail_taken_in(self, error: FuserveError) -> None:
        """End those that have been taken in with an error, where nothing has told of their end."""
        with self.lock:
            arriving = {request.request_id for request in self.arrivals}
            lost = [request_id for request_id in self._mailboxes if request_id not in arriving]
            mailboxes = [self._mailboxes.pop(request_id) for request_id in lost]
        wake([mailbox.fail(error) for mailbox in mailboxes])

    def pause(self, seconds: float) -> bool:
        """Wait within a step, which is then no sign of being stuck; True if it is time to stop."""
        with self.lock:
            self._turn_began_s = None
            if self._draining:
                self._idle.set()
            return self.lock.wait_for(lambda: self._stopping, seconds)

    def _run(self) -> None:
        try:
            work = self._begin()
        except BaseException as error:
            self._begin_error = error
            self._death = f"{self._title} could not be started: {error}"
            return
        finally:
            self._begun.set()
        try:
            while self._take_in(work):
                work.step()
            self.deliver(work.abort_all())
        except BaseException as error:
            _log.exception("%s's thread has died.", self._title)
            self._die(f"{self._title}'s thread has died: {error!r}")
        finally:
            self._idle.set()
            work.close()

    def _take_in(self, work: Work[Request, Kind]) -> bool:
        """Wait for something to do, and take in what has come; False if it is time to stop."""
        with self.lock:
            while not (self.arrivals or self._aborts or work.has_unfinished or self._stopping):
                if self._draining:
                    self._idle.set()
                self._turn_began_s = None
                work.rest()
                self.lock.wait()
            self._turn_began_s = self._clock()
            while self.arrivals:
                work.enqueue(self.arrivals.popleft())
        while self._aborts:
            self.deliver(work.abort(self._aborts.popleft()))
        return not self._stopping

    def _die(self, reason: str) -> None:
        with self.lock:
            self._death = reason
            mailboxes, self._mailboxes = list(self._mailboxes.values()), {}
        wake([mailbox.fail(EngineStoppedError(reason)) for mailbox in mailboxes])
