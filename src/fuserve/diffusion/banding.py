"""Programs in less memory: large values that are made in bands of rows where they are read.

What only the next convolutions read need not lie in memory as a whole. A banded program makes it
twice: band by band for the sums of its group norms, and once more for its readers, each of which
makes as many rows of its own result from a band. Rows that filters see beyond a band are computed
with it. Every number is the same sum in the same order as in the whole program, and statistics are
those of the whole image: results are equal to the bit, and there is nothing to blend.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

from fuserve.diffusion.arena import fullest, program_bytes
from fuserve.diffusion.program import (
    ChannelSums,
    Conv,
    ImageSums,
    Op,
    Program,
    Rows,
    Value,
)
from fuserve.diffusion.program_checks import check_program

ROW_STEP = 4
"""Rows of a square of Winograd's F(4x4): bands begin where the whole image's squares do."""

NUM_BANDS = 32
"""A band takes about this part of the value's memory; some rows at its edges are made twice."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A value that can be made in bands: what makes it, and what reads it, right behind."""

    producer: Conv
    readers: tuple[Conv, ...]

    @property
    def value(self) -> Value:
        """The value."""
        return self.producer.out

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return 4 * self.value.tokens * self.value.channels

    @property
    def band_rows(self) -> int:
        """Rows of a band: whole squares."""
        return max(1, self.value.height // NUM_BANDS // ROW_STEP) * ROW_STEP


def fit(program: Program, max_bytes: int) -> Program:
    """The program with as few values in bands as let it run in ``max_bytes``.

    Each time the largest goes that is there when memory is fullest. Where that does not help, the
    program is as small as it gets; ``program_bytes`` says what it takes.
    """
    least = program_bytes(program)
    while least > max_bytes:
        alive = fullest(program)
        found = [one for one in candidates(program) if one.value in alive]
        if not found:
            break
        smaller = banded(program, max(found, key=lambda one: one.num_bytes))
        needed = program_bytes(smaller)
        if needed >= least:
            break
        program, least = smaller, needed
    return program


def candidates(program: Program) -> Iterator[Candidate]:
    """Values of one image that a convolution makes and nothing but those behind it read."""
    readers: defaultdict[Value, list[Op]] = defaultdict(list)
    for op in program.ops:
        for value in set(op.reads()):
            readers[value].append(op)
    fixed = {*program.outputs.values(), *program.views}
    fixed |= {rows.value for rows in program.views.values()}
    for index, op in enumerate(program.ops):
        reading = readers[op.out]
        following = program.ops[index + 1 : index + 1 + len(reading)]
        if op.out in fixed or not reading or tuple(reading) != following or not _is_plain(op):
            continue
        ends = {reader.out for reader in reading}
        found = Candidate(op, tuple(one for one in reading if _is_plain(one) and not one.upsample))
        if len(found.readers) < len(reading) or found.band_rows >= op.out.height:
            continue
        if not any(ends & set(reader.reads()) for reader in reading):
            yield found


def banded(program: Program, candidate: Candidate) -> Program:
    """The program with the candidate's value in bands."""
    first = program.ops.index(candidate.producer)
    bands = _Bands(program, candidate)
    bands.write()
    ops = (*program.ops[:first], *bands.ops, *program.ops[first + 1 + len(candidate.readers) :])
    result = Program(tuple(bands.values), program.inputs, program.outputs, ops, bands.views)
    check_program(result)
    return result


def _is_plain(op: Op) -> TypeGuard[Conv]:
    """A convolution whose rows of one image depend on rows at the same height."""
    if not isinstance(op, Conv):
        return False
    is_single = all(value.batch == 1 for value in (op.out, *op.reads()))
    return is_single and op.stride == 1 and op.padding == (op.size // 2,) * 4


@dataclass(frozen=True, slots=True)
class _Band:
    """Some rows of the value, of which the outermost may be wrong: their neighbours are missing."""

    memory: Value
    first: int


class _Bands:
    """Writes the operations that take the place of a candidate's."""

    def __init__(self, program: Program, candidate: Candidate) -> None:
        self._producer, self._readers = candidate.producer, candidate.readers
        self._value = candidate.value
        self._step = candidate.band_rows
        self.values = list(program.values)
        self.views = dict(program.views)
        self.ops: list[Op] = []
        self._viewed: dict[tuple[Value, int, int], Value] = {}
        self._has_gone = False
        self._sums: dict[Value, Value] = {}

    def write(self) -> None:
        value, margin = self._value, max(reader.size // 2 for reader in self._readers)
        for op in (self._producer, *self._readers):
            for source in op.sources if op.norm is not None else ():
                if source != value and source not in self._sums:
                    self._sums[source] = self._all_sums(source)
        if any(value in reader.sources and reader.norm is not None for reader in self._readers):
            self._sums[value] = self._banded_sums()
        for first, last in self._spans():
            band = self._band(first - margin, last + margin)
            for reader in self._readers:
                out = self._view(reader.out, first, last)
                self.ops.append(self._piece(reader, first, last, out, band))

    def _spans(self) -> Iterator[tuple[int, int]]:
        height = self._value.height
        for first in range(0, height, self._step):
            yield first, min(first + self._step, height)

    def _banded_sums(self) -> Value:
        value = self._value
        sums = self._new(1 + value.norm_chunks, 1, 2 * value.channels)
        pivots, of_row = self._view(sums, 0, 1), value.norm_chunks // value.height
        for first, last in self._spans():
            band = self._band(first, last)
            rows = self._view(band.memory, first - band.first, last - band.first)
            begin = 1 + first * of_row if first else 0
            end = 1 + last * of_row
            out = self._view(sums, begin, end)
            self.ops.append(self._summing(out, rows, pivots if first else None))
        return sums

    def _all_sums(self, source: Value) -> Value:
        sums = self._new(1 + source.norm_chunks, 1, 2 * source.channels)
        self.ops.append(self._summing(sums, source, None))
        return sums

    def _summing(self, out: Value, source: Value, pivots: Value | None) -> ChannelSums:
        return ChannelSums(f"{self._producer.name}.sums", out, source, pivots)

    def _band(self, first: int, last: int) -> _Band:
        """Make at least the rows [first, last) that there are of the value."""
        op, value = self._producer, self._value
        if op.upsample:
            # It makes all rows of its source, the outermost as if nothing lay beyond.
            source_height = op.sources[0].height
            begin, end = max(0, (first - 1) // 2), min(source_height, last // 2 + 1)
            memory = self._new(2 * (end - begin), value.width, value.channels)
            self.ops.append(self._of_rows(op, begin, end, 2 * begin, memory, None))
            return _Band(memory, 2 * begin)
        begin = max(0, first) // ROW_STEP * ROW_STEP
        end = min(value.height, -(-last // ROW_STEP) * ROW_STEP)
        memory = self._new(end - begin, value.width, value.channels)
        self.ops.append(self._piece(op, begin, end, memory, None))
        return _Band(memory, begin)

    def _piece(self, op: Conv, first: int, last: int, out: Value, band: _Band | None) -> Conv:
        """The rows [first, last) of an operation's result."""
        margin, height = op.size // 2, op.out.height
        begin, end = max(0, first - margin), min(height, last + margin)
        top, bottom = begin - (first - margin), last + margin - end
        piece = self._of_rows(op, begin, end, first, out, band)
        return replace(piece, padding=(top, margin, bottom, margin))

    def _of_rows(
        self, op: Conv, begin: int, end: int, first: int, out: Value, band: _Band | None
    ) -> Conv:
        """The operation with the rows [begin, end) of its sources, writing ``out`` at ``first``."""

        def read(value: Value, start: int, stop: int) -> Value:
            if band is not None and value == self._value:
                return self._view(band.memory, start - band.first, stop - band.first)
            return self._view(value, start, stop)

        sums = None
        if op.norm is not None:
            values = tuple(self._sums[source] for source in op.sources)
            sums = ImageSums(values, op.sources[0].tokens)
        residual = op.residual
        if residual is not None:
            residual = read(residual, first, first + out.height)
        sources = tuple(read(source, begin, end) for source in op.sources)
        return replace(op, out=out, sources=sources, residual=residual, sums=sums)

    def _view(self, value: Value, first: int, last: int) -> Value:
        """Rows [first, last) of a value."""
        if (first, last) == (0, value.height):
            return value
        key = (value, first, last)
        if key not in self._viewed:
            view = self._new(last - first, value.width, value.channels)
            self.views[view] = Rows(value, first)
            self._viewed[key] = view
        return self._viewed[key]

    def _new(self, height: int, width: int, channels: int) -> Value:
        """A value, the first of all in the place of the one that goes."""
        index = len(self.values) if self._has_gone else self._value.index
        value = Value(index, 1, height, width, channels)
        self.values[index : index + 1] = [value]
        self._has_gone = True
        return value
