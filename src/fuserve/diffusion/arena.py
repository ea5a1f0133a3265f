"""Where a program's values lie in one block of memory that they share over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 16
"""Floats of a cache line."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A value's size in floats, and the first and last operation that touch it."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at some operation."""
        return self.first <= other.last and other.first <= self.last


def plan_arena(values: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets in floats, and the arena's size: large values first, each as low as it fits.

    Values that are alive at the same operation never overlap (greedy by size, arXiv 2001.03288).
    """
    offsets = [0] * len(values)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(values)), key=lambda i: (-values[i].size, i)):
        size = -(-values[index].size // ALIGNMENT) * ALIGNMENT
        offset = 0
        for other in sorted(placed, key=lambda i: offsets[i]):
            if not values[index].meets(values[other]):
                continue
            if offset + size <= offsets[other]:
                break
            end = offsets[other] + values[other].size
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + size)
    return offsets, total
