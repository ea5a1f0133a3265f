"""Where a program's values lie in one block of memory that they share over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fuserve.diffusion.program import (
    Conv,
    GroupNorm,
    Linear,
    Normalize,
    Op,
    Program,
    Rows,
    Value,
)

FLOAT_BYTES = 4

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
        meeting = [other for other in placed if values[index].meets(values[other])]
        for other in sorted(meeting, key=lambda i: offsets[i]):
            if offset + size <= offsets[other]:
                break
            end = offsets[other] + values[other].size
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + size)
    return offsets, total


def place_values(program: Program) -> dict[Value, int]:
    """Where values lie in the arena, in floats; inputs, outputs and their rows lie elsewhere.

    A result takes the place of a residual that nothing reads later: the epilogue reads each of its
    values just before it writes there.
    """
    homes = _homes(program)
    lifetimes = _lifetimes(program, homes)
    offsets, _ = plan_arena(list(lifetimes.values()))
    places = dict(zip(lifetimes, offsets, strict=True))
    for value, home in homes.items():
        if home.value in places:
            row_floats = home.value.width * home.value.channels
            places[value] = places[home.value] + home.first * row_floats
    return places


def program_bytes(program: Program) -> int:
    """Memory of a program's values, inputs and outputs too, and of the sums of its group norms."""
    places = place_values(program)
    arena = max((offset + value.size for value, offset in places.items()), default=0)
    bound = {*program.inputs.values(), *program.outputs.values()}
    sums = max((_norm_floats(op) for op in program.ops), default=0)
    return FLOAT_BYTES * (arena + sum(value.size for value in bound) + sums)


def fullest(program: Program) -> set[Value]:
    """The values that lie in the arena when it holds most."""
    lifetimes = _lifetimes(program, _homes(program))
    changes = [0] * (len(program.ops) + 1)
    for one in lifetimes.values():
        changes[one.first] += one.size
        changes[one.last + 1] -= one.size
    held = list(accumulate(changes))
    peak = held.index(max(held))
    return {value for value, one in lifetimes.items() if one.first <= peak <= one.last}


def _lifetimes(program: Program, homes: Mapping[Value, Rows]) -> dict[Value, Lifetime]:
    """Of each value that has a place of its own in the arena."""
    bound = {*program.inputs.values(), *program.outputs.values()}
    found: dict[Value, Lifetime] = {}
    for index, op in enumerate(program.ops):
        for value in (op.out, *op.reads()):
            home = homes.get(value, Rows(value, 0)).value
            if home not in bound:
                first = found[home].first if home in found else index
                found[home] = Lifetime(home.size, first, index)
    return found


def _homes(program: Program) -> dict[Value, Rows]:
    """The value whose memory each has, where that is another's."""
    homes = dict(program.views)
    bound = {*program.inputs.values(), *program.outputs.values()}
    apart = {rows.value for rows in program.views.values()}  # what is written bit by bit
    last = {
        homes.get(value, Rows(value, 0)).value: op for op in program.ops for value in op.reads()
    }
    for op in program.ops:
        residual = op.residual if isinstance(op, Conv | Linear) else None
        if residual is None or {residual, op.out} & (bound | program.views.keys()):
            continue
        if op.out in apart:
            continue
        ends = last[residual] is op and op.reads().count(residual) == 1
        if ends and residual.stored_shape == op.out.stored_shape:
            homes[op.out] = homes.get(residual, Rows(residual, 0))
    return homes


def _norm_floats(op: Op) -> int:
    """What an executor keeps while it finds a group norm's statistics."""
    if not isinstance(op, Conv | Normalize) or not isinstance(op.norm, GroupNorm) or op.sums:
        return 0
    return sum(2 * source.channels * source.batch * source.norm_chunks for source in op.sources)
