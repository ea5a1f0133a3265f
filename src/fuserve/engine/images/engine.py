"""ImageEngine: pictures painted on a thread of its own, asked for from asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask, seeds_of
from fuserve.engine.async_engine import EngineHealth
from fuserve.engine.images.model import ServedModel
from fuserve.engine.images.priority import give_way
from fuserve.engine.images.request import ImageOutput, ImageRequest, ImageUpdate
from fuserve.engine.images.stats import ImageObserver, ImageStats
from fuserve.engine.images.step_loop import StepLoop
from fuserve.engine.queue_limits import QueueLimits
from fuserve.engine.request_stream import Mailbox, RequestStream, wake
from fuserve.errors import EngineStoppedError

_log = logging.getLogger("fuserve.engine.images")
_JOIN_TIMEOUT_S = 30.0


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
        max_running: int = 8,
        max_queue_requests: int = 32,
        observer: ImageObserver | None = None,
        stuck_after_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_running = max_running
        self._limits = QueueLimits(max_queue_requests, 0, clock)
        self._observer = observer
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="fuserve-images", daemon=True)
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._model: ServedModel | None = None
        self._loop: StepLoop | None = None
        # Of what follows.
        self._wakeup = threading.Condition()
        self._arrivals: deque[ImageRequest] = deque()
        self._aborts: deque[str] = deque()
        self._mailboxes: dict[str, Mailbox[ImageUpdate]] = {}
        self._draining = False
        self._stopping = False
        self._death: str | None = None
        self._idle = threading.Event()
        self._turn_began_s: float | None = None

    def start(self) -> None:
        """Start the thread, and wait until the model is loaded.

        Raises:
            FuserveError: as loading it does.
        """
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

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
        mailbox: Mailbox[ImageUpdate] = Mailbox()
        with self._wakeup:
            if self._death is not None:
                raise EngineStoppedError(self._death)
            if self._draining:
                raise EngineStoppedError("The engine is being stopped and takes no more requests.")
            self._limits.check(self._num_waiting(), 0, 0)
            self._mailboxes[request.request_id] = mailbox
            self._arrivals.append(request)
            self._limits.note_waiting()
            self._wakeup.notify()
        return RequestStream(request.request_id, mailbox, self.abort)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        # Without the lock where it is taken: a stream's finalizer may run under it.
        self._aborts.append(request_id)
        if self._wakeup.acquire(blocking=False):
            try:
                self._wakeup.notify()
            finally:
                self._wakeup.release()

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the present ones end, abort those that have not, and stop."""
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
            _log.error("The image engine's thread does not stop: %s", self.health().reason)

    def stats(self) -> ImageStats:
        """Figures of this moment."""
        with self._wakeup:
            return ImageStats(
                0 if self._loop is None else self._loop.num_running,
                self._num_waiting(),
                self.model.prompt_queries,
                self.model.prompt_hits,
            )

    def health(self) -> EngineHealth:
        """Whether the engine's thread is alive and not stuck in a step."""
        if self._death is not None:
            return EngineHealth(False, self._death)
        if not self._thread.is_alive():
            return EngineHealth(False, "The image engine's thread is not running.")
        began_s = self._turn_began_s
        turn_s = 0.0 if began_s is None else self._clock() - began_s
        if turn_s > self._stuck_after_s:
            return EngineHealth(False, f"The image engine has been in one step for {turn_s:.0f} s.")
        return EngineHealth(True)

    def _num_waiting(self) -> int:
        """Requests beyond those that run, or will before the next step."""
        if self._loop is None:
            return len(self._arrivals)
        num_open = self._loop.num_running + self._loop.num_waiting + len(self._arrivals)
        return max(0, num_open - self._max_running)

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        give_way()
        try:
            self._model = self._load()
        except BaseException as error:
            self._load_error = error
            self._death = f"The image model could not be loaded: {error}"
            return
        finally:
            self._loaded.set()
        self._loop = StepLoop(
            self._model,
            max_running=self._max_running,
            observer=self._observer,
            clock=self._clock,
        )
        try:
            while self._take_in(self._loop):
                num_waiting = self._loop.num_waiting
                updates = self._loop.step()
                with self._wakeup:
                    num_begun = num_waiting - self._loop.num_waiting
                    self._limits.note_begun(num_begun, self._num_waiting())
                self._deliver(updates)
            self._deliver(self._loop.abort_all())
        except BaseException as error:
            _log.exception("The image engine's thread has died.")
            self._die(f"The image engine's thread has died: {error!r}")
        finally:
            self._idle.set()
            self._loop = None

    def _take_in(self, loop: StepLoop) -> bool:
        """Wait for something to do, and take in what has come; False if it is time to stop."""
        with self._wakeup:
            while not (self._arrivals or self._aborts or loop.has_unfinished or self._stopping):
                if self._draining:
                    self._idle.set()
                self._turn_began_s = None
                self._wakeup.wait()
            self._turn_began_s = self._clock()
            while self._arrivals:
                loop.enqueue(self._arrivals.popleft())
        while self._aborts:
            self._deliver(loop.abort(self._aborts.popleft()))
        return not self._stopping

    def _deliver(self, updates: Iterable[ImageUpdate]) -> None:
        outputs: list[ImageOutput] = []
        waiters = []
        for update in updates:
            with self._wakeup:
                mailbox = self._mailboxes[update.request_id]
                if update.output is not None:
                    del self._mailboxes[update.request_id]
                    outputs.append(update.output)
            waiters.append(mailbox.put(update))
        wake(waiters)
        if self._observer is not None:
            for output in outputs:
                self._observer.on_finished(output)

    def _die(self, reason: str) -> None:
        with self._wakeup:
            self._death = reason
            mailboxes, self._mailboxes = list(self._mailboxes.values()), {}
        wake([mailbox.fail(EngineStoppedError(reason)) for mailbox in mailboxes])
