"""AsyncEngine: an engine on a thread of its own, used from asyncio and from other threads."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fuserve.engine.backoff import Backoff
from fuserve.engine.embedding import Pooling
from fuserve.engine.engine import Engine
from fuserve.engine.intake import Terms
from fuserve.engine.outputs import EmbeddingOutput, RequestOutput, RequestUpdate
from fuserve.engine.queue_limits import QueueLimits
from fuserve.engine.request import Request
from fuserve.engine.request_stream import Mailbox, RequestStream, wake
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.stats import EngineObserver, EngineStats, StepStats
from fuserve.errors import (
    EngineStoppedError,
    FuserveError,
    InvalidRequestError,
    RankFailedError,
    RequestFailedError,
)

_log = logging.getLogger("fuserve.engine")
_JOIN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine's thread is alive and gets on; ``reason`` says why not."""

    ok: bool
    reason: str = ""


class AsyncEngine:
    """Runs an engine on its own thread; requests come and go between its steps.

    When a rank of the engine's executor fails, all requests end with ``RankFailedError``, and none
    are taken until the ranks have been started anew, which is tried again and again.

    Args:
        engine: nobody else may use it.
        max_queue_requests: requests that may wait to begin.
        max_queue_tokens: tokens that their prompts may have together.
        observer: hears of every step and every ended request.
        stuck_after_s: a step, its delivery included, that takes longer makes ``health`` bad.
        backoff: how long to wait before ranks are started anew.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue_requests: int = 64,
        max_queue_tokens: int = 65536,
        observer: EngineObserver | None = None,
        stuck_after_s: float = 60.0,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = QueueLimits(max_queue_requests, max_queue_tokens, clock)
        self._observer = observer
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="fuserve-engine", daemon=True)
        # Of what follows, and held while requests go from here into the engine.
        self._wakeup = threading.Condition()
        self._arrivals: deque[Request] = deque()
        self._aborts: deque[str] = deque()
        self._mailboxes: dict[str, Mailbox[RequestUpdate]] = {}
        self._draining = False
        self._stopping = False
        self._death: str | None = None
        self._backoff = backoff or Backoff()
        self._lost: RankFailedError | None = None  # until the ranks run again
        self._idle = threading.Event()  # set once draining has left nothing to do
        self._turn_began_s: float | None = None  # None while there is nothing to do
        engine.on_failure(self._notice_failure)

    @property
    def max_queue_requests(self) -> int:
        """Requests that may wait to begin."""
        return self._limits.max_requests

    @property
    def hidden_size(self) -> int:
        """Length of an embedding."""
        return self._engine.hidden_size

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream[RequestUpdate]:
        """Queue a request; never waits for a step. ``Terms`` tells of the other arguments.

        Raises:
            InvalidRequestError, CapacityError: it could never be served.
            QueueFullError: too much is waiting now.
            EngineStoppedError: the engine takes no requests any more.
        """

        terms = Terms(request_id, prompt, priority, client, timeout_s)

        def prepare() -> Request:
            return self._engine.prepare(prompt_token_ids, params, terms)

        return self._submit(len(prompt_token_ids), prepare)

    async def embed(
        self,
        prompt_token_ids: Sequence[int],
        *,
        pooling: Pooling,
        normalize: bool = True,
        client: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> EmbeddingOutput:
        """Embed a prompt; cancelling it aborts the request. See ``Engine.prepare_embedding``.

        Raises:
            InvalidRequestError, CapacityError, QueueFullError, EngineStoppedError: as ``submit``.
            RequestFailedError: the request failed while it ran.
        """
        terms = Terms(None, None, priority, client, timeout_s)

        def prepare() -> Request:
            return self._engine.prepare_embedding(
                prompt_token_ids, pooling, terms, normalize=normalize
            )

        async with aclosing(self._submit(len(prompt_token_ids), prepare)) as stream:
            async for update in stream:
                output = update.output
                if output is not None and output.error is not None:
                    raise output.error
                if output is not None and output.embedding is not None:
                    return EmbeddingOutput(output.embedding, output.num_prompt_tokens)
        raise EngineStoppedError("The engine was stopped before the prompt was embedded.")

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise if ``submit`` would, except for what is waiting. Any thread may call it.

        A constraint is compiled here, which may take long, and kept for ``submit``.

        Raises:
            InvalidRequestError, CapacityError: it could never be served.
        """
        self._engine.check_request(prompt_token_ids, params)

    def _submit(
        self, num_tokens: int, prepare: Callable[[], Request]
    ) -> RequestStream[RequestUpdate]:
        with self._wakeup:
            self._check_open(num_tokens)
        request = prepare()  # may take long, and needs no lock
        mailbox: Mailbox[RequestUpdate] = Mailbox()
        with self._wakeup:
            self._check_open(num_tokens)
            if request.request_id in self._mailboxes:
                raise InvalidRequestError(f"The request id {request.request_id!r} is in use.")
            self._mailboxes[request.request_id] = mailbox
            self._arrivals.append(request)
            self._limits.note_waiting()
            self._wakeup.notify()
        return RequestStream(request.request_id, mailbox, self.abort)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        # A stream's finalizer comes here, in whatever thread, even one that holds the lock: so
        # this takes none. Who waits under the lock has nothing that could be aborted, or is woken.
        self._aborts.append(request_id)
        if self._wakeup.acquire(blocking=False):
            try:
                self._wakeup.notify()
            finally:
                self._wakeup.release()

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the present ones end, abort those that have not, and stop.

        Args:
            grace_s: how long to wait for them.
        """
        with self._wakeup:
            self._draining = True
            self._wakeup.notify()
        if not self._thread.is_alive():
            return
        await asyncio.to_thread(self._idle.wait, grace_s)
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("The engine's thread does not stop: %s", self.health().reason)

    def stats(self) -> EngineStats:
        """Figures of this moment, requests on their way to the engine included."""
        with self._wakeup:
            stats = self._engine.stats()
            return replace(
                stats,
                num_waiting=stats.num_waiting + len(self._arrivals),
                num_waiting_tokens=stats.num_waiting_tokens + self._num_arrived_tokens(),
            )

    def health(self) -> EngineHealth:
        """Whether the engine's thread is alive and not stuck in a step."""
        if self._death is not None:
            return EngineHealth(False, self._death)
        if not self._thread.is_alive():
            return EngineHealth(False, "The engine's thread is not running.")
        began_s = self._turn_began_s
        turn_s = 0.0 if began_s is None else self._clock() - began_s
        if turn_s > self._stuck_after_s:
            return EngineHealth(False, f"The engine has been in one step for {turn_s:.0f} s.")
        return EngineHealth(True)

    def readiness(self) -> EngineHealth:
        """Whether new requests are taken: healthy, and no ranks on their way back."""
        lost = self._lost or self._engine.failure
        return self.health() if lost is None else EngineHealth(False, str(lost))

    def _num_arrived_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self._arrivals)

    def _check_open(self, num_tokens: int) -> None:
        if self._death is not None:
            raise EngineStoppedError(self._death)
        if self._draining:
            raise EngineStoppedError("The engine is being stopped and takes no more requests.")
        lost = self._lost or self._engine.failure
        if lost is not None:
            raise RankFailedError(str(lost))
        self._limits.check(
            self._engine.num_queued_requests + len(self._arrivals),
            self._engine.num_queued_tokens + self._num_arrived_tokens(),
            num_tokens,
        )

    def _notice_failure(self) -> None:
        with self._wakeup:
            self._wakeup.notify()

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_in():
                if self._engine.failure is not None:
                    self._recover(self._engine.failure)
                else:
                    self._step()
            self._deliver(self._engine.abort_all())
        except BaseException as error:
            _log.exception("The engine's thread has died.")
            self._die(f"The engine's thread has died: {error!r}")
        finally:
            self._idle.set()

    def _take_in(self) -> bool:
        """Wait for something to do, and take in what has come; False if it is time to stop."""
        with self._wakeup:
            while not (
                self._arrivals
                or self._aborts
                or self._engine.has_unfinished
                or self._stopping
                or self._engine.failure is not None
            ):
                if self._draining:
                    self._idle.set()
                self._turn_began_s = None
                self._limits.note_begun(0, num_still_waiting=0)
                self._wakeup.wait()
            self._turn_began_s = self._clock()
            while self._arrivals:
                self._engine.enqueue(self._arrivals.popleft())
        while self._aborts:
            request_id = self._aborts.popleft()
            output = self._engine.abort(request_id)
            if output is not None:
                self._deliver([RequestUpdate(request_id, [], output)])
        return not self._stopping

    def _step(self) -> None:
        began_s = self._clock()
        num_queued = self._engine.num_queued_requests
        try:
            updates = self._engine.step()
        except Exception as error:  # not the executor's, which the engine contains: our own
            _log.exception("A step has failed outside of the model.")
            self._fail_all(RequestFailedError(f"The engine has failed: {error!r}"))
            return
        num_still_queued = self._engine.num_queued_requests
        with self._wakeup:
            num_waiting = num_still_queued + len(self._arrivals)
            self._limits.note_begun(num_queued - num_still_queued, num_waiting)
        self._deliver(updates)
        last = self._engine.last_step
        if last is not None and self._observer is not None:
            # A step that was in flight before this turn has been executing beside it.
            overhead_s = max(0.0, self._clock() - began_s - last.execute_s)
            step = StepStats.of(last.load, last.execute_s, overhead_s)
            self._observer.on_step(step, self._engine.stats())

    def _recover(self, failure: RankFailedError) -> None:
        """End everything, and start the ranks anew; once, so that the loop sees what has come."""
        _log.error("%s", failure)
        self._lost = failure
        self._fail_all(failure)
        delay_s = self._backoff.delay_s()
        with self._wakeup:
            self._turn_began_s = None
            if self._draining:
                self._idle.set()
            if self._wakeup.wait_for(lambda: self._stopping, delay_s):
                return
        try:
            self._engine.restart()
        except RankFailedError as error:
            _log.error("The ranks do not start: %s", error)
        else:
            _log.warning("The ranks run again.")
            self._lost = None

    def _fail_all(self, error: FuserveError) -> None:
        self._deliver(self._engine.fail_all(error))
        # Those that the failed step had taken out of the engine but not reported.
        with self._wakeup:
            arriving = {request.request_id for request in self._arrivals}
            lost = [request_id for request_id in self._mailboxes if request_id not in arriving]
            mailboxes = [self._mailboxes.pop(request_id) for request_id in lost]
        wake([mailbox.fail(error) for mailbox in mailboxes])

    def _deliver(self, updates: Iterable[RequestUpdate]) -> None:
        outputs: list[RequestOutput] = []
        waiters = []
        for update in updates:
            mailbox = self._mailboxes[update.request_id]
            waiters.append(mailbox.put(update))
            if update.output is not None:
                del self._mailboxes[update.request_id]
                outputs.append(update.output)
        wake(waiters)
        if self._observer is not None:
            for output in outputs:
                self._observer.on_finished(output)

    def _die(self, reason: str) -> None:
        with self._wakeup:
            self._death = reason
            mailboxes, self._mailboxes = list(self._mailboxes.values()), {}
        wake([mailbox.fail(EngineStoppedError(reason)) for mailbox in mailboxes])
