"""LocalGroup: the worker processes of this host, started, watched, and ended together."""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fuserve.errors import RankFailedError
from fuserve.parallel.rank_process import Message, RankProcess

_log = logging.getLogger("fuserve.parallel")

_WATCH_INTERVAL_S = 0.25
_SETTLE_S = 2.0
"""For the watching thread to find out which rank was to blame, once an exchange has failed."""


class LocalGroup:
    """Ranks 1, 2, … of a group. When one dies or hangs, all are killed: none can go on alone.

    A thread of its own starts them, hears what they say, and watches over them; they die with it,
    so none outlives this process, however it ends.

    Args:
        program: the module that each rank runs.
        descriptors: what each rank inherits, by its number.
        step_timeout_s: a step that takes longer has a rank that hangs.
        join_timeout_s: a starting rank that says nothing for so long has failed.
        on_failure: called once, when all are dead: on the watching thread, or on the one whose own
            failure ends the group.

    Raises:
        RankFailedError: one could not be started, or has died already.
    """

    def __init__(
        self,
        program: str,
        descriptors: Mapping[int, Sequence[int]],
        *,
        step_timeout_s: float,
        join_timeout_s: float,
        on_failure: Callable[[RankFailedError], None],
    ) -> None:
        self.failure: RankFailedError | None = None
        self.processes: list[RankProcess] = []
        self._program = program
        self._descriptors = descriptors
        self._step_timeout_s = step_timeout_s
        self._join_timeout_s = join_timeout_s
        self._on_failure = on_failure
        self._step_began_s: float | None = None
        self._leave_s = 0.0
        self._closing = threading.Event()
        self._news = threading.Condition()  # of processes, what they said, and failure
        self._thread = threading.Thread(target=self._watch, name="fuserve-ranks", daemon=True)
        self._thread.start()
        try:
            with self._news:
                self._news.wait_for(lambda: self._is_started or self.failure is not None)
            self.check()
        except BaseException:
            self.close()
            raise

    @property
    def _is_started(self) -> bool:
        return len(self.processes) == len(self._descriptors)

    def check(self) -> None:
        """Raise RankFailedError if a rank has failed."""
        if self.failure is not None:
            raise RankFailedError(str(self.failure))

    def hear(
        self, kind: str, progress: Callable[[Message], None] | None = None
    ) -> dict[int, Message]:
        """Wait until every rank has said this, and return what each said.

        Raises:
            RankFailedError: one has failed.
        """
        told: dict[int, float] = {}
        with self._news:
            while not all(kind in process.heard for process in self.processes):
                self.check()
                self._news.wait()
                for process in self.processes:
                    message = process.heard.get("progress")
                    if progress and message and told.get(process.rank) != process.heard_s:
                        told[process.rank] = process.heard_s
                        progress(message)
            self.check()
            return {process.rank: process.heard[kind] for process in self.processes}

    @property
    def process_ids(self) -> list[int]:
        """Of all ranks but 0."""
        return [process.process_id for process in self.processes]

    def tell(self, contents: Mapping[int, Mapping[str, Any]]) -> None:
        """Send each rank its message.

        Raises:
            RankFailedError: one has failed.
        """
        for process in self.processes:
            try:
                process.send(contents[process.rank])
            except OSError as error:
                raise self.blame(error) from error

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A part of a step; it fails if it takes longer than a step may.

        Raises:
            RankFailedError: whatever goes wrong in the block, or if a rank has failed before.
        """
        self.check()
        self._step_began_s = time.monotonic()
        try:
            yield
        except Exception as error:
            raise self.blame(error) from error
        finally:
            self._step_began_s = None

    def blame(self, error: Exception) -> RankFailedError:
        """End the group because of what went wrong here; the error says which rank was the cause.

        A rank that dies is first noticed by those that wait for it. The watching thread knows
        better, a moment later.
        """
        with self._news:
            self._news.wait_for(lambda: self.failure is not None, _SETTLE_S)
        if self.failure is None:
            self._fail(f"rank 0 has failed: {error}")
        return RankFailedError(str(self.failure))

    def close(self, *, leave_s: float = 0.0) -> None:
        """End the ranks. Those that were told to stop have ``leave_s`` to do so."""
        self._leave_s = leave_s
        self._closing.set()
        self._thread.join()

    # What follows runs on the watching thread, but for _fail.

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            try:
                for rank, descriptors in self._descriptors.items():
                    process = RankProcess(rank, descriptors, self._program)
                    selector.register(process.control, selectors.EVENT_READ, process)
                    selector.register(process.pidfd, selectors.EVENT_READ, process)
                    with self._news:
                        self.processes.append(process)
                        self._news.notify_all()
                while not self._closing.is_set():
                    self._turn(selector)
            except Exception as error:
                self._fail(f"the ranks could not be started or watched: {error}")
                _log.exception("Watching the ranks has failed.")
                self._closing.wait()
        for process in self.processes:
            process.leave(self._leave_s)
            process.close()

    def _turn(self, selector: selectors.BaseSelector) -> None:
        died = False
        for key, _ in selector.select(_WATCH_INTERVAL_S):
            process: RankProcess = key.data
            if key.fileobj is process.control:
                if process.take_message():
                    with self._news:
                        self._news.notify_all()
                else:
                    selector.unregister(process.control)
            else:
                selector.unregister(process.pidfd)
                died = True
        if self._closing.is_set() or self.failure is not None:
            return
        if died or any("failed" in process.heard for process in self.processes):
            self._fail("; ".join(self._dead()))
        now_s = time.monotonic()
        began_s = self._step_began_s
        if began_s is not None and now_s - began_s > self._step_timeout_s:
            states = "; ".join(process.epitaph() for process in self.processes)
            self._fail(f"a step has not ended within {self._step_timeout_s:g} s: {states}")
        for process in self.processes:
            silent_s = now_s - process.heard_s
            if "ready" not in process.heard and silent_s > self._join_timeout_s:
                self._fail(
                    f"{process.epitaph()} and has not joined: it has said nothing for "
                    f"{silent_s:.0f} s"
                )

    def _dead(self) -> list[str]:
        """Those that died first: what a rank said of itself counts more than that it is gone."""
        for process in self.processes:
            while not process.control.closed and process.control.poll(0):
                if not process.take_message():
                    break
        failed = [process for process in self.processes if "failed" in process.heard]
        gone = [process for process in self.processes if not process.is_alive()]
        return [process.epitaph() for process in failed or gone]

    def _fail(self, reason: str) -> None:
        with self._news:
            if self.failure is not None:
                return
            self.failure = RankFailedError(reason)
        for process in self.processes:
            with suppress(OSError):
                process.kill()
        self._on_failure(self.failure)
        with self._news:
            self._news.notify_all()
