"""ImageEngine: pictures painted on a thread of its own, asked for from asyncio."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask, seeds_of
from fuserve.engine.engine_thread import EngineHealth, EngineThread
from fuserve.engine.images.model import ServedModel
from fuserve.engine.images.priority import give_way
from fuserve.engine.images.request import ImageRequest, ImageUpdate
from fuserve.engine.images.stats import ImageObserver, ImageStats
from fuserve.engine.images.step_loop import StepLoop
from fuserve.engine.queue_limits import QueueLimits
from fuserve.engine.request_stream import RequestStream

MAX_RUNNING = 8
"""Requests whose steps take turns, unless it is said otherwise."""


class ImageEngine:
    """Runs a model on its own thread; requests come and go between its steps.

    The thread and those of the model give way to others: see ``give_way``.

    Args:
        load: makes the model, on the engine's thread, whose priority its threads inherit.
        max_running: requests whose steps take turns.
        max_queue_requests: requests that may wait to begin.
        observer: hears of every step and every ended request.
        stuck_after_s: a step that takes longer makes ``health`` bad.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        *,
        max_running: int = MAX_RUNNING,
        max_queue_requests: int = 32,
        observer: ImageObserver | None = None,
        stuck_after_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_running = max_running
        self._limits = QueueLimits(max_queue_requests, 0, clock)
        self._observer = observer
        self._clock = clock
        self._model: ServedModel | None = None
        self._loop: StepLoop | None = None
        self._thread: EngineThread[ImageRequest, ImageUpdate] = EngineThread(
            self._begin,
            self._note_ended,
            name="fuserve-images",
            title="The image engine",
            stuck_after_s=stuck_after_s,
            clock=clock,
        )

    def start(self) -> None:
        """Start the thread, and wait until the model is loaded.

        Raises:
            FuserveError: as loading it does.
        """
        self._thread.start()

    @property
    def model(self) -> ServedModel:
        """What paints; only what never changes may be asked, by other threads."""
        assert self._model is not None, "the engine has not been started"
        return self._model

    def submit(
        self,
        prompt: str,
        params: ImageParams,
        *,
        num_previews: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream[ImageUpdate]:
        """Queue a request; never waits for a step.

        Args:
            prompt: of all pictures.
            params: the rest.
            num_previews: of each picture; there are no more than steps.
            client: whom it belongs to.
            timeout_s: it fails if it takes longer.

        Raises:
            InvalidRequestError: it could never be served.
            QueueFullError: too much is waiting now.
            EngineStoppedError: the engine takes no requests any more.
        """
        seeds = tuple(seeds_of(params))
        ImageTask(self.model, [prompt], seeds[:1], params)  # raises what is wrong
        now_s = self._clock()
        request = ImageRequest(
            f"img-{uuid.uuid4().hex}",
            prompt,
            params,
            seeds,
            num_previews,
            client,
            now_s,
            None if timeout_s is None else now_s + timeout_s,
        )

        def admit() -> None:
            self._limits.check(self._num_waiting(), 0, 0)
            self._limits.note_waiting()

        return self._thread.submit(request, admit)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        self._thread.abort(request_id)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the present ones end, abort those that have not, and stop."""
        await self._thread.drain(grace_s)

    def stats(self) -> ImageStats:
        """Figures of this moment."""
        with self._thread.lock:
            return ImageStats(
                0 if self._loop is None else self._loop.num_running,
                self._num_waiting(),
                0 if self._loop is None else self._loop.num_bytes,
                self.model.prompt_queries,
                self.model.prompt_hits,
            )

    def health(self) -> EngineHealth:
        """Whether the engine's thread is alive and not stuck in a step."""
        return self._thread.health()

    def _num_waiting(self) -> int:
        """Requests beyond those that run, or will before the next step."""
        num_open = len(self._thread.arrivals)
        if self._loop is not None:
            num_open += self._loop.num_running + self._loop.num_waiting
        return max(0, num_open - self._max_running)

    def _note_ended(self, update: ImageUpdate) -> None:
        if self._observer is not None and update.output is not None:
            self._observer.on_finished(update.output)

    # What follows runs on the engine's thread.

    def _begin(self) -> _Turns:
        give_way()
        self._model = self._load()
        self._loop = StepLoop(
            self._model,
            max_running=self._max_running,
            observer=self._observer,
            clock=self._clock,
        )
        return _Turns(self._loop, self._thread, self._limits, self._num_waiting, self._model)


class _Turns:
    """Turn by turn, a piece of work of one request. See ``Work``."""

    def __init__(
        self,
        loop: StepLoop,
        thread: EngineThread[ImageRequest, ImageUpdate],
        limits: QueueLimits,
        num_waiting: Callable[[], int],
        model: ServedModel,
    ) -> None:
        self._loop, self._thread, self._limits = loop, thread, limits
        self._num_waiting, self._model = num_waiting, model

    @property
    def has_unfinished(self) -> bool:
        return self._loop.has_unfinished

    def enqueue(self, request: ImageRequest) -> None:
        self._loop.enqueue(request)

    def abort(self, request_id: str) -> Iterable[ImageUpdate]:
        return self._loop.abort(request_id)

    def abort_all(self) -> Iterable[ImageUpdate]:
        return self._loop.abort_all()

    def rest(self) -> None:
        self._limits.note_begun(0, num_still_waiting=0)

    def close(self) -> None:
        self._model.close()

    def step(self) -> None:
        num_waiting = self._loop.num_waiting
        updates = self._loop.step()
        with self._thread.lock:
            num_begun = num_waiting - self._loop.num_waiting
            self._limits.note_begun(num_begun, self._num_waiting())
        self._thread.deliver(updates)
        if not self._loop.has_unfinished:
            self._model.release()  # not in rest(), where the lock would keep requests waiting
