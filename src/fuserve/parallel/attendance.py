"""Whether the ranks of several hosts are still there while the group starts."""

from __future__ import annotations

import time

from torch.distributed import Store  # type: ignore[attr-defined]

from fuserve.errors import RankFailedError
from fuserve.parallel.torchrun import torchrun_rank, torchrun_size

_POLL_S = 0.02
_BEAT_S = 0.5


class Attendance:
    """What each rank writes into the store that all have: that it goes on, and how far it is.

    ``torch.distributed`` would wait for a rank that hangs as long as for one that has much to load.

    Args:
        store: of the group alone.
        timeout_s: a rank that says nothing for so long has failed.
    """

    def __init__(self, store: Store, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._num_meetings = 0
        self._num_beats = 0
        self._beat_s = 0.0

    def beat(self) -> None:
        """Say that this rank goes on; often, it writes only now and then."""
        now_s = time.monotonic()
        if now_s - self._beat_s >= _BEAT_S:
            self._beat_s = now_s
            self._num_beats += 1
            self._store.set(f"beat/{torchrun_rank()}", str(self._num_beats))

    def meet(self) -> None:
        """Wait until all ranks have come here.

        Raises:
            RankFailedError: one has said nothing for too long.
            RuntimeError: the host that keeps the store has gone.
        """
        place = f"meeting/{self._num_meetings}"
        self._num_meetings += 1
        self._store.set(f"{place}/{torchrun_rank()}", "")
        awaited = set(range(torchrun_size())) - {torchrun_rank()}
        heard: dict[int, tuple[bytes, float]] = {}
        began_s = time.monotonic()
        while awaited := {n for n in awaited if not self._store.check([f"{place}/{n}"])}:
            now_s = time.monotonic()
            for rank in awaited:
                beat = self._store.get(key) if self._store.check([key := f"beat/{rank}"]) else b""
                if rank not in heard or heard[rank][0] != beat:
                    heard[rank] = beat, now_s
            silent = [n for n in sorted(awaited) if now_s - heard[n][1] > self._timeout_s]
            if silent:
                ranks = ", ".join(map(str, silent))
                raise RankFailedError(
                    f"rank {ranks} has said nothing for {self._timeout_s:.0f} s while the group "
                    f"starts, {now_s - began_s:.0f} s after rank {torchrun_rank()} was ready: it "
                    "hangs, or its host has gone. Look at its log"
                )
            time.sleep(_POLL_S)
