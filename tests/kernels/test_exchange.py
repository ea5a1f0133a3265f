"""Sums among ranks through shared memory: fixed order, any size, and errors instead of hangs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fuserve.decoder.communicator import tree_sum
from fuserve.kernels.exchange import ExchangeError, SharedExchange
from tests.decoder.ranks import shared_memory


def group(size: int, floats: int, timeout_s: float = 20.0) -> list[SharedExchange]:
    memory = shared_memory(size, floats)
    return [
        SharedExchange(memory, rank=rank, size=size, floats=floats, timeout_s=timeout_s)
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 16, 37, 1000])
def test_all_ranks_get_the_tree_sum_of_all_parts(size: int, count: int) -> None:
    rng = np.random.default_rng(size * count)
    parts = [
        (rng.standard_normal((5, count)) * 10.0 ** rng.integers(-4, 5, (5, count))).astype("f4")
        for _ in range(size)
    ]
    exchanges = group(size, floats=100)  # so that 1000 go in ten exchanges

    def run(rank: int) -> np.ndarray:
        mine = parts[rank].copy()
        for row in mine:
            exchanges[rank].all_reduce(row)
        return mine

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for result in results:
        assert np.array_equal(result, tree_sum(parts))


def test_a_rank_that_does_not_come_is_an_error_that_names_it() -> None:
    (first, _) = group(2, 16, timeout_s=0.05)
    with pytest.raises(ExchangeError, match="rank 1 did not come"):
        first.all_reduce(np.ones(4, np.float32))


def test_aborting_ends_the_wait_of_all_ranks() -> None:
    (first, second) = group(2, 16, timeout_s=60.0)
    timer = threading.Timer(0.05, second.abort)
    timer.start()
    start = time.monotonic()
    with pytest.raises(ExchangeError, match="being ended"):
        first.all_reduce(np.ones(4, np.float32))
    assert time.monotonic() - start < 30
    timer.join()


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        SharedExchange(shared_memory(2, 16), rank=0, size=2, floats=1600, timeout_s=1.0)
