"""How the processes that ``torchrun`` has started find each other, and nobody of an earlier start.

``torchrun`` starts ranks again on each host by itself, and its store keeps what earlier ones have
written; its count of restarts is not the same on all hosts. So every process brings a name that was
never used, and rank 0 publishes which names are the group, until all of these have agreed.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fuserve.errors import RankFailedError
from fuserve.parallel.torchrun import torchrun_rank, torchrun_size

_POLL_S = 0.05
_GROUP = "fuserve/group"


def join_group(step_timeout_s: float, join_timeout_s: float) -> Store:
    """Make this process one of ``torch.distributed``'s default group.

    Args:
        step_timeout_s: how long to wait for another rank within a step.
        join_timeout_s: how long to wait until all are there.

    Returns:
        What all of the group can write into and read, and nobody else does.

    Raises:
        RankFailedError: they are not.
    """
    rank, size = torchrun_rank(), torchrun_size()
    deadline_s = time.monotonic() + join_timeout_s
    try:
        store = _store(rank, join_timeout_s)
        own = PrefixStore(f"fuserve/{_meet(store, rank, size, deadline_s)}", store)
        dist.init_process_group(
            "gloo",
            store=PrefixStore("torch", own),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=step_timeout_s),
        )
    except RuntimeError as error:
        raise RankFailedError(f"the ranks cannot reach each other: {plain(error)}") from error
    return own


def plain(error: Exception) -> str:
    """What one of torch's messages says at first, without where in its source it comes from."""
    line = str(error).split("\n", 1)[0].split(". ", 1)[0]
    return line.split("] ", 1)[-1] if line.startswith("[") else line


def _store(rank: int, timeout_s: float) -> Store:
    """That of torchrun's agents, or one of our own where they have none."""
    has_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not has_agents,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _meet(store: Store, rank: int, size: int, deadline_s: float) -> str:
    """The name of a group in which this process and all others are, and know it."""
    name = uuid.uuid4().hex
    store.set(f"fuserve/name/{rank}", name)
    missing: list[int] = []
    while time.monotonic() < deadline_s:
        if rank == 0:
            names = [_read(store, f"fuserve/name/{other}") for other in range(size)]
            store.set(_GROUP, json.dumps(names))
        else:
            names = json.loads(_read(store, _GROUP) or "[]") or [""] * size
        if names[rank] == name and all(names):
            group = uuid.uuid5(uuid.NAMESPACE_OID, " ".join(names)).hex
            store.set(f"fuserve/{group}/agreed/{rank}", "")
            missing = [n for n in range(size) if not store.check([f"fuserve/{group}/agreed/{n}"])]
            if not missing:
                return group
        else:
            missing = [other for other, one in enumerate(names) if not one]
        time.sleep(_POLL_S)
    raise RankFailedError(f"ranks {missing or 'other than this one'} have not joined")


def _read(store: Store, key: str) -> str:
    """What is there; nothing if nobody has written."""
    return store.get(key).decode() if store.check([key]) else ""
