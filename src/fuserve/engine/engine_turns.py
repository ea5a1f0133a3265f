"""EngineTurns: what the thread of a language model's engine does, turn by turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from fuserve.engine.backoff import Backoff
from fuserve.engine.engine import Engine
from fuserve.engine.engine_thread import EngineThread
from fuserve.engine.outputs import RequestUpdate
from fuserve.engine.queue_limits import QueueLimits
from fuserve.engine.request import Request
from fuserve.engine.stats import EngineObserver, StepStats
from fuserve.errors import FuserveError, RankFailedError, RequestFailedError

_log = logging.getLogger("fuserve.engine")


class EngineTurns:
    """Steps, and ranks that are started anew when one has failed. See ``Work``.

    Args:
        engine: nobody else may use it.
        thread: whose turns these are.
        limits: of the queue; are told how it moves.
        observer: hears of every step.
        backoff: how long to wait before ranks are started anew.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread[Request, RequestUpdate],
        limits: QueueLimits,
        observer: EngineObserver | None,
        backoff: Backoff,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._limits = limits
        self._observer = observer
        self._backoff = backoff
        self._clock = clock
        self._lost: RankFailedError | None = None

    @property
    def failure(self) -> RankFailedError | None:
        """Why nothing can run now; None once the ranks run again. Any thread may ask."""
        return self._lost or self._engine.failure

    @property
    def has_unfinished(self) -> bool:
        """There is something to do."""
        return self._engine.has_unfinished or self._engine.failure is not None

    def enqueue(self, request: Request) -> None:
        """Take a request in."""
        self._engine.enqueue(request)

    def abort(self, request_id: str) -> Iterable[RequestUpdate]:
        """End a request, and tell of it; nothing if it has ended."""
        output = self._engine.abort(request_id)
        return [] if output is None else [RequestUpdate(request_id, [], output)]

    def abort_all(self) -> Iterable[RequestUpdate]:
        """End all requests, and tell of it."""
        return self._engine.abort_all()

    def rest(self) -> None:
        """Nothing is left to do."""
        self._limits.note_begun(0, num_still_waiting=0)

    def close(self) -> None:
        """Whoever loaded the model ends its ranks."""

    def step(self) -> None:
        """One step of the engine, or one attempt to start its ranks anew."""
        if self._engine.failure is not None:
            self._recover(self._engine.failure)
            return
        began_s = self._clock()
        num_queued = self._engine.num_queued_requests
        try:
            updates = self._engine.step()
        except Exception as error:  # not the executor's, which the engine contains: our own
            _log.exception("A step has failed outside of the model.")
            self._fail_all(RequestFailedError(f"The engine has failed: {error!r}"))
            return
        num_still_queued = self._engine.num_queued_requests
        with self._thread.lock:
            num_waiting = num_still_queued + len(self._thread.arrivals)
            self._limits.note_begun(num_queued - num_still_queued, num_waiting)
        self._thread.deliver(updates)
        last = self._engine.last_step
        if last is not None and self._observer is not None:
            # A step that was in flight before this turn has been executing beside it.
            overhead_s = max(0.0, self._clock() - began_s - last.execute_s)
            step = StepStats.of(last.load, last.execute_s, overhead_s)
            self._observer.on_step(step, self._engine.stats())

    def _recover(self, failure: RankFailedError) -> None:
        """End everything, and start the ranks anew; once, so that what has come is seen."""
        _log.error("%s", failure)
        self._lost = failure
        self._fail_all(failure)
        if self._thread.pause(self._backoff.delay_s()):
            return
        try:
            self._engine.restart()
        except RankFailedError as error:
            _log.error("The ranks do not start: %s", error)
        else:
            _log.warning("The ranks run again.")
            self._lost = None

    def _fail_all(self, error: FuserveError) -> None:
        self._thread.deliver(self._engine.fail_all(error))
        self._thread.fail_taken_in(error)
