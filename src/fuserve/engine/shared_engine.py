"""SharedEngine: one engine for all threads that call it, stepped by whichever of them waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fuserve.engine.engine import Engine
from fuserve.engine.outputs import RequestOutput, RequestUpdate
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import CapacityError, FuserveError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt in the form the engine takes; ``text`` is None if it came as token ids."""

    text: str | None
    token_ids: Sequence[int]
    params: SamplingParams


class SharedEngine:
    """Routes what each step gives to the callers it belongs to.

    When a rank of the engine's executor has failed, the requests of that moment end with an error,
    and the ranks are started anew for the next ones.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()  # of the engine, the inboxes and closed
        self._inboxes: dict[str, deque[RequestUpdate]] = {}
        self._leaving: deque[str] = deque()
        self._closed = False

    def check(self, queries: Sequence[Query]) -> None:
        """Raise if any query could never be served.

        Raises:
            InvalidRequestError, CapacityError: saying which of several.
        """
        for number, query in enumerate(queries):
            try:
                self._engine.check_request(query.token_ids, query.params)
            except (InvalidRequestError, CapacityError) as error:
                where = f"prompts[{number}]: " if len(queries) > 1 else ""
                raise type(error)(f"{where}{error}") from None

    def run(self, queries: Sequence[Query]) -> list[RequestOutput]:
        """Run all queries together to their ends."""
        with self._running(queries) as request_ids:
            return [self._output_of(request_id) for request_id in request_ids]

    def updates(self, query: Query) -> Generator[RequestUpdate, None, None]:
        """Run a query and yield its updates; dropping the iterator aborts it."""
        with self._running([query]) as (request_id,):
            finished = False
            while not finished:
                update = self._next_update(request_id)
                finished = update.output is not None
                yield update

    def check_open(self) -> None:
        """Raise FuserveError after ``close``."""
        if self._closed:
            raise FuserveError("This LLM is closed. Make a new one.")

    def close(self) -> bool:
        """Abort all requests; return False if it was closed before."""
        with self._lock:
            was_open, self._closed = not self._closed, True
            self._leaving.extend(self._inboxes)
            self._let_go()
        return was_open

    @contextmanager
    def _running(self, queries: Sequence[Query]) -> Iterator[list[str]]:
        """The queries in the engine; those unfinished at the end of the block are aborted."""
        request_ids: list[str] = []
        try:
            with self._lock:
                self.check_open()
                if self._engine.failure is not None:
                    self._restart(self._engine.failure)
                for query in queries:
                    request_id = self._engine.add_request(
                        query.token_ids, query.params, prompt=query.text
                    )
                    self._inboxes[request_id] = deque()
                    request_ids.append(request_id)
            yield request_ids
        finally:
            self._leaving.extend(request_ids)
            # This may run in a generator's finalizer, in the midst of a step of the same thread:
            # waiting for the lock would never end. Who holds it lets go before its next step.
            if self._lock.acquire(blocking=False):
                try:
                    self._let_go()
                finally:
                    self._lock.release()

    def _restart(self, failure: FuserveError) -> None:
        for update in self._engine.fail_all(failure):
            self._inboxes[update.request_id].append(update)
        self._engine.restart()

    def _let_go(self) -> None:
        while self._leaving:
            request_id = self._leaving.popleft()
            self._engine.abort(request_id)
            self._inboxes.pop(request_id, None)

    def _output_of(self, request_id: str) -> RequestOutput:
        while True:
            update = self._next_update(request_id)
            if update.output is not None:
                return update.output

    def _next_update(self, request_id: str) -> RequestUpdate:
        """Step the engine, for all who wait, until it has something for this request."""
        while True:
            with self._lock:
                self.check_open()
                inbox = self._inboxes[request_id]
                if inbox:
                    return inbox.popleft()
                self._let_go()
                for update in self._engine.step():
                    self._inboxes[update.request_id].append(update)
