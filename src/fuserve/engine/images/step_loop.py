"""StepLoop: the requests that are open, and the one piece of work that comes next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from fuserve.engine.images.model import ServedModel
from fuserve.engine.images.painting import Painting
from fuserve.engine.images.preview import Previews
from fuserve.engine.images.request import (
    FinishReason,
    ImageOutput,
    ImageRequest,
    ImageUpdate,
)
from fuserve.engine.images.stats import ImageObserver
from fuserve.engine.images.turns import Turns
from fuserve.errors import DeadlineError, FuserveError, RankFailedError, RequestFailedError

_log = logging.getLogger("fuserve.engine.images")


class StepLoop:
    """For one thread.

    Args:
        model: what paints.
        max_running: requests whose steps take turns; the others wait.
        observer: hears of every step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        max_running: int,
        observer: ImageObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._max_running = max_running
        self._observer = observer
        self._clock = clock
        self._previews = Previews(model)
        self._turns = Turns()
        self._waiting: dict[str, ImageRequest] = {}
        self._running: dict[str, Painting] = {}
        self._begun_s: dict[str, float] = {}
        self._num_bytes: dict[str, int] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._running)

    @property
    def num_bytes(self) -> int:
        """What they held after their latest steps. Any thread may ask."""
        return sum(list(self._num_bytes.values()))

    @property
    def has_unfinished(self) -> bool:
        """There is something to do."""
        return bool(self._waiting or self._running)

    def enqueue(self, request: ImageRequest) -> None:
        """Take a request in."""
        self._waiting[request.request_id] = request
        self._turns.arrive(request)

    def abort(self, request_id: str) -> list[ImageUpdate]:
        """End a request; what it held is free at once. Nothing happens if it has ended."""
        if request_id not in self._waiting and request_id not in self._running:
            return []
        return [self._end(request_id, "abort")]

    def abort_all(self) -> list[ImageUpdate]:
        """End all requests."""
        ids = [*self._running, *self._waiting]
        return [self._end(request_id, "abort") for request_id in ids]

    def step(self) -> list[ImageUpdate]:
        """Let those begin that may, and do the next piece of work of one request.

        Whatever goes wrong in it ends that request, and no other.
        """
        updates = self._end_late()
        while self._waiting and len(self._running) < self._max_running:
            updates += self._begin(self._turns.next_to_begin(self._waiting.values()))
        if not self._running:
            return updates
        running = (painting.request for painting in self._running.values())
        request = self._turns.next_to_step(running)
        painting = self._running[request.request_id]
        kind, work, began_s = painting.kind, painting.work(), self._clock()
        try:
            update = painting.advance()
        except Exception as error:
            return [*updates, self._end(request.request_id, "error", _failure(error))]
        self._turns.charge(request, work)
        self._num_bytes[request.request_id] = painting.num_bytes
        if self._observer is not None:
            self._observer.on_step(kind, self._clock() - began_s)
        if update is not None:
            updates.append(update)
        if painting.is_done:
            updates.append(self._end(request.request_id, "stop"))
        return updates

    def _begin(self, request: ImageRequest) -> list[ImageUpdate]:
        try:
            painting = Painting(self._model, request, self._previews)
        except Exception as error:
            return [self._end(request.request_id, "error", _failure(error))]
        del self._waiting[request.request_id]
        self._running[request.request_id] = painting
        self._begun_s[request.request_id] = self._clock()
        self._turns.begin(request)
        return []

    def _end_late(self) -> list[ImageUpdate]:
        now_s = self._clock()
        requests = [
            *self._waiting.values(),
            *(painting.request for painting in self._running.values()),
        ]
        late = [each for each in requests if (each.deadline_s or math.inf) <= now_s]
        return [
            self._end(
                request.request_id,
                "error",
                DeadlineError(
                    f"The pictures were not finished within {now_s - request.arrival_s:.0f} s."
                ),
            )
            for request in late
        ]

    def _end(
        self, request_id: str, reason: FinishReason, error: FuserveError | None = None
    ) -> ImageUpdate:
        painting = self._running.pop(request_id, None)
        self._num_bytes.pop(request_id, None)
        request = self._waiting.pop(request_id) if painting is None else painting.request
        self._turns.leave(request, has_begun=painting is not None)
        if painting is not None:
            painting.cancel()
        output = ImageOutput(
            request_id,
            reason,
            0 if painting is None else painting.num_images,
            self._model.count_tokens(request.prompt),
            0 if painting is None else painting.num_latents,
            request.arrival_s,
            self._begun_s.pop(request_id, None),
            self._clock(),
            error,
        )
        return ImageUpdate(request_id, output=output)


def _failure(error: Exception) -> FuserveError:
    if isinstance(error, RankFailedError):
        _log.error("%s", error)  # what it says is all that this process knows
    if isinstance(error, FuserveError):
        return error
    _log.error("A request for pictures has failed.", exc_info=error)
    return RequestFailedError(f"The pictures could not be made: {error!r}")
