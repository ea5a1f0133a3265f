"""Workers: threads for work that would hold up the event loop, such as compiling a grammar."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_NUM_THREADS = 2

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Workers:
    """A few threads, all of them started at once: a server under load has as many as an idle one.

    Work that finds none free waits; it is short, and the cores belong to the model.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fuserve-worker")
        all_there = threading.Barrier(_NUM_THREADS + 1)
        for _ in range(_NUM_THREADS):
            self._pool.submit(all_there.wait)
        all_there.wait()

    async def run(
        self,
        work: Callable[Arguments, Result],
        /,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Do the work on one of the threads; raises what it raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(work, *args, **kwargs))

    def close(self) -> None:
        """Let the threads end once their work is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
