"""What ``torchrun`` tells the processes that it starts."""

from __future__ import annotations

import os


def started_by_torchrun() -> bool:
    """Whether this process is one of a group that ``torchrun`` has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_rank() -> int:
    """This process's rank in the group."""
    return int(os.environ["RANK"])


def torchrun_size() -> int:
    """How many ranks the group has."""
    return int(os.environ["WORLD_SIZE"])


def local_ranks() -> int:
    """How many of them are on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def num_restarts() -> int:
    """How often the group has been started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
