"""Training in several processes of one thread each, which average their gradients.

On cores shared with other work this is much faster than one process of several threads, which
waits at every operation for its slowest thread; here the ranks meet once a step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn


def run(count: int, task: Callable[..., None], *arguments: Any) -> None:
    """Call ``task(*arguments)`` in ``count`` processes and wait for all."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        multiprocessing.spawn(_enter, (count, store, task, arguments), nprocs=count)


def rank() -> int:
    """This process's number; 0 when alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def meet() -> None:
    """Wait until all ranks are here."""
    if count() > 1:
        distributed.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every rank's gradients the mean over the ranks."""
    if count() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    flat = torch.cat([each.reshape(-1) for each in gradients])
    distributed.all_reduce(flat)
    flat /= count()
    for each, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        each.copy_(mean.view(each.shape))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The ranks' tensors, of one shape, one after the other along the first dimension."""
    if count() == 1:
        return tensor
    every = [torch.empty_like(tensor) for _ in range(count())]
    distributed.all_gather(every, tensor)
    return torch.cat(every)


def _enter(
    rank: int, count: int, store: Path, task: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count
    )
    task(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()
