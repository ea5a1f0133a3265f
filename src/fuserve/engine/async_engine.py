"""AsyncEngine: an engine on a thread of its own, used from asyncio and from other threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from fuserve.engine.backoff import Backoff
from fuserve.engine.embedding import Pooling
from fuserve.engine.engine import Engine
from fuserve.engine.engine_thread import EngineHealth, EngineThread
from fuserve.engine.engine_turns import EngineTurns
from fuserve.engine.intake import Terms
from fuserve.engine.outputs import EmbeddingOutput, RequestUpdate
from fuserve.engine.queue_limits import QueueLimits
from fuserve.engine.request import Request
from fuserve.engine.request_stream import RequestStream
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.stats import EngineObserver, EngineStats
from fuserve.errors import EngineStoppedError, RankFailedError


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
        self._thread: EngineThread[Request, RequestUpdate] = EngineThread(
            lambda: self._turns,
            self._note_ended,
            name="fuserve-engine",
            title="The engine",
            stuck_after_s=stuck_after_s,
            clock=clock,
        )
        self._turns = EngineTurns(
            engine, self._thread, self._limits, observer, backoff or Backoff(), clock
        )
        engine.on_failure(self._thread.notify)

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
        with self._thread.lock:
            self._thread.check_open()
            self._check_room(num_tokens)
        request = prepare()  # may take long, and needs no lock

        def admit() -> None:
            self._check_room(num_tokens)
            self._limits.note_waiting()

        return self._thread.submit(request, admit)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        self._thread.abort(request_id)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the present ones end, abort those that have not, and stop.

        Args:
            grace_s: how long to wait for them.
        """
        await self._thread.drain(grace_s)

    def stats(self) -> EngineStats:
        """Figures of this moment, requests on their way to the engine included."""
        with self._thread.lock:
            stats = self._engine.stats()
            return replace(
                stats,
                num_waiting=stats.num_waiting + len(self._thread.arrivals),
                num_waiting_tokens=stats.num_waiting_tokens + self._num_arrived_tokens(),
            )

    def health(self) -> EngineHealth:
        """Whether the engine's thread is alive and not stuck in a step."""
        return self._thread.health()

    def readiness(self) -> EngineHealth:
        """Whether new requests are taken: healthy, and no ranks on their way back."""
        lost = self._turns.failure
        return self.health() if lost is None else EngineHealth(False, str(lost))

    def _num_arrived_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self._thread.arrivals)

    def _check_room(self, num_tokens: int) -> None:
        lost = self._turns.failure
        if lost is not None:
            raise RankFailedError(str(lost))
        self._limits.check(
            self._engine.num_queued_requests + len(self._thread.arrivals),
            self._engine.num_queued_tokens + self._num_arrived_tokens(),
            num_tokens,
        )

    def _note_ended(self, update: RequestUpdate) -> None:
        if self._observer is not None and update.output is not None:
            self._observer.on_finished(update.output)
