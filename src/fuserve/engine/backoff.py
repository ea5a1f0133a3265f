"""Backoff: how long to wait before something that failed is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable


class Backoff:
    """Delays that double from failure to failure, until there has been none for a while.

    Args:
        first_s: the delay after a first failure.
        longest_s: no delay is longer.
        forget_after_s: a failure that comes so long after the last one counts as a first one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        first_s: float = 0.1,
        longest_s: float = 30.0,
        forget_after_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._forget_after_s = forget_after_s
        self._clock = clock
        self._next_s = first_s
        self._quiet_until_s = clock()

    def delay_s(self) -> float:
        """Seconds to wait now, after another failure."""
        now_s = self._clock()
        if now_s >= self._quiet_until_s:
            self._next_s = self._first_s
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._longest_s)
        self._quiet_until_s = now_s + delay_s + self._forget_after_s
        return delay_s
