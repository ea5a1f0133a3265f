"""Giving way: threads whose work can wait, for those that somebody watches."""

from __future__ import annotations

import os
import sys
import threading

_NICENESS = 10
"""About a tenth of a core beside a thread of usual priority, and all of it when that one rests."""


def give_way() -> None:
    """Lower the priority of this thread and of all that it will start.

    Images and text cannot take turns on the cores step by step, as a step of a large picture takes
    seconds. So both run, and the system's scheduler gives text what it asks for at once. Only Linux
    has a priority for each thread.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))
