"""How much may wait, and when whoever is turned away should come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fuserve.errors import QueueFullError

_MEASURED_REQUESTS = 64
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 600.0


@dataclass(slots=True)
class QueueLimits:
    """Bounds of the queue, and the rate at which it has lately moved.

    Attributes:
        max_requests: that may wait.
        max_tokens: that their prompts may have together. A prompt longer than that is taken when
            nothing else waits, or it could never run.
        clock: monotonic seconds.
    """

    max_requests: int
    max_tokens: int
    clock: Callable[[], float]
    # When the latest requests left the queue, by a clock that stands still while it is empty: what
    # nobody waited for tells nothing of how fast it moves.
    _begun: deque[float] = field(
        default_factory=lambda: deque(maxlen=_MEASURED_REQUESTS), init=False
    )
    _moved_s: float = field(default=0.0, init=False)
    _waiting_since_s: float | None = field(default=None, init=False)

    def note_waiting(self) -> None:
        """A request waits."""
        if self._waiting_since_s is None:
            self._waiting_since_s = self.clock()

    def note_begun(self, num_requests: int, num_still_waiting: int) -> None:
        """So many requests have just left the queue to run, and so many wait on."""
        moved_s = self._moving_s()
        self._begun.extend(moved_s for _ in range(min(num_requests, _MEASURED_REQUESTS)))
        if num_still_waiting == 0:
            self._moved_s, self._waiting_since_s = moved_s, None

    def check(self, num_waiting: int, num_waiting_tokens: int, num_tokens: int) -> None:
        """Raise if a prompt of so many tokens has no place in the queue.

        Raises:
            QueueFullError: with the time after which to try again.
        """
        if num_waiting >= self.max_requests:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, which is as many as may.",
                retry_after_s=self._retry_after_s(num_waiting),
            )
        if num_waiting > 0 and num_waiting_tokens + num_tokens > self.max_tokens:
            raise QueueFullError(
                f"Prompts of {num_waiting_tokens} tokens are waiting; with this one of "
                f"{num_tokens} there would be more than {self.max_tokens}.",
                retry_after_s=self._retry_after_s(num_waiting),
            )

    def _retry_after_s(self, num_waiting: int) -> float:
        """Seconds in which all that wait now will have begun, at the rate of late."""
        if len(self._begun) < 2:
            return _MIN_RETRY_S
        seconds_per_request = (self._moving_s() - self._begun[0]) / len(self._begun)
        return min(max(math.ceil(num_waiting * seconds_per_request), _MIN_RETRY_S), _MAX_RETRY_S)

    def _moving_s(self) -> float:
        """Seconds in which anything waited."""
        since_s = self._waiting_since_s
        return self._moved_s + (0.0 if since_s is None else self.clock() - since_s)
