"""What the kernel benchmark concludes from its times."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.kernel_cases.measure import (
    COLD_BYTES,
    Claim,
    Effort,
    Row,
    in_turns,
    num_copies,
    repeated,
    roofline_row,
)


def row(*, operations: float, num_bytes: float, in_bytes: bool = False) -> Row:
    return roofline_row(
        "int4",
        "8x8",
        "M=8",
        {"fuserve": 2.0, "slow peer": 6.0, "peer": 4.0},
        operations=operations,
        num_bytes=num_bytes,
        arithmetic=("int4 dot", 100e9),
        read_bytes_per_s=10e9,
        in_bytes=in_bytes,
    )


def test_much_arithmetic_on_few_bytes_is_bound_by_the_instructions() -> None:
    result = row(operations=100e9, num_bytes=1e9)
    assert (result.bound, result.rate, result.fraction) == ("int4 dot", 50.0, 0.5)


def test_little_arithmetic_on_many_bytes_is_bound_by_memory() -> None:
    result = row(operations=20e9, num_bytes=10e9)
    assert (result.bound, result.ceiling, result.fraction) == ("memory", 20.0, 0.5)


def test_a_single_token_is_given_in_bytes() -> None:
    result = row(operations=20e9, num_bytes=10e9, in_bytes=True)
    assert (result.unit, result.rate, result.fraction) == ("GB/s", 5.0, 0.5)


def test_the_fastest_peer_counts() -> None:
    result = row(operations=1e9, num_bytes=1e9)
    assert (result.peer, result.peer_ratio) == ("peer", 2.0)


def test_every_kernel_has_a_turn_in_each_round_and_walks_through_its_copies() -> None:
    used: dict[str, list[int]] = {"a": [], "b": []}
    calls = {"a": (used["a"].append, 3), "b": (used["b"].append, 1)}
    seconds = in_turns(calls, Effort(threads=1, rounds=2, turn_s=0.0))
    assert used == {"a": [0, 1, 2, 0], "b": [0, 0, 0, 0]}  # warm-up, calibration, two rounds
    assert all(value >= 0 for value in seconds.values())


def test_copies_are_aligned_and_outgrow_the_caches() -> None:
    one = np.arange(100, dtype=np.uint8)
    copies = repeated(one, 3)
    assert all((copy == one).all() and copy.ctypes.data % 64 == 0 for copy in copies)
    assert num_copies(100) * 100 >= COLD_BYTES
    assert num_copies(2 * COLD_BYTES) == 1


@pytest.mark.parametrize(("fraction", "verdict"), [(0.7, "met"), (0.69, "MISSED")])
def test_a_claim_says_whether_it_holds(fraction: float, verdict: str) -> None:
    assert verdict in str(Claim("GEMM", fraction, 0.7, "70 of 100 GOP/s"))
