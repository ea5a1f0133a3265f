"""One image made by several ranks, each of which has a band of its rows: exact patch parallelism.

``band_program`` turns a program into a rank's own: every value that belongs to the image shrinks to
the rank's rows, and where an operation needs more, moves bring it:

- the rows of neighbours that a 3x3 convolution sees;
- the sums of all rows that a group norm goes by, added in one order in all ranks;
- keys and values of all tokens.

Nothing is left out and nothing is of an earlier step (as in DistriFusion, arXiv 2402.19481), so the
image is the one that a single rank makes, bit for bit.

Bands are cut at the coarsest resolution; at the others a row stands for two, four, ... rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fuserve.diffusion.program import (
    Attention,
    ChannelSums,
    Conv,
    GroupNorm,
    ImageSums,
    Linear,
    Move,
    Normalize,
    Op,
    Program,
    Slice,
    Value,
)
from fuserve.diffusion.program_checks import check_program
from fuserve.errors import InvalidRequestError

WINOGRAD_ROWS = 4
"""Output rows that Winograd's transforms compute together, counted from the image's first row. A
rank whose band begins or ends between them sees the rows that the whole tile sees."""


class Bands:
    """Which rows of each value each rank has, and which of its neighbours' it needs.

    Args:
        program: of the whole image.
        banded: the inputs that belong to the image; of the others every rank has all.
        size: how many ranks there are.

    Raises:
        InvalidRequestError: the image has too few rows.
        ValueError: an operation mixes images and other values as no network here does.
    """

    def __init__(self, program: Program, banded: Collection[str], size: int) -> None:
        self.size = size
        self._halvings = _halvings(program, banded)
        self._deepest = max(self._halvings.values())
        rows = max(-(-value.height // self._scale(value)) for value in self._halvings)
        self._cuts = [rows * rank // size for rank in range(size + 1)]
        for value in self._halvings:
            if not all(self.rows(value, rank) for rank in range(size)):
                raise InvalidRequestError(
                    f"An image of {rows} rows at the network's coarsest resolution has no bands "
                    f"for patch_parallel={size} ranks: at most {rows} can share it."
                )
        self._seen: dict[tuple[Value, int], range] = {}
        for op in program.ops:
            if isinstance(op, Conv) and op.out in self:
                for source in op.sources:
                    for rank in range(size):
                        self._see(source, rank, _seen_rows(op, self.rows(op.out, rank)))

    def __contains__(self, value: Value) -> bool:
        """Whether the value belongs to the image."""
        return value in self._halvings

    def rows(self, value: Value, rank: int) -> range:
        """The rows that a rank has."""
        scale = self._scale(value)
        first, last = (min(cut * scale, value.height) for cut in self._cuts[rank : rank + 2])
        return range(first, last)

    def seen(self, value: Value, rank: int) -> range:
        """The rows that a rank has, and those around them that it needs."""
        return self._seen.get((value, rank), self.rows(value, rank))

    def sent(self, value: Value) -> tuple[tuple[int, ...], ...]:
        """For each rank, those of its rows that others need."""
        wanted = [self.seen(value, rank) for rank in range(self.size)]
        return tuple(
            tuple(
                row
                for row in self.rows(value, rank)
                if any(row in rows for other, rows in enumerate(wanted) if other != rank)
            )
            for rank in range(self.size)
        )

    def _scale(self, value: Value) -> int:
        """Rows for each row of the coarsest resolution."""
        return 1 << (self._deepest - self._halvings[value])

    def _see(self, value: Value, rank: int, rows: range) -> None:
        before = self.seen(value, rank)
        first, last = max(rows.start, 0), min(rows.stop, value.height)
        seen = range(min(before.start, first), max(before.stop, last))
        self._seen[value, rank] = seen


def band_program(program: Program, banded: Collection[str], rank: int, size: int) -> Program:
    """The program by which one rank makes its band of the image.

    Inputs that belong to the image hold the rank's rows and those around them that it needs, as
    ``Value`` says. Outputs that belong to it hold, in every rank, all rows.

    Args:
        program: of the whole image.
        banded: the names of its inputs that belong to the image.
        rank: the rank.
        size: how many ranks there are.

    Raises:
        InvalidRequestError: the image has fewer rows than ranks at its coarsest resolution.
        ValueError: the program has an operation that cannot be divided.
    """
    return _BandWriter(program, Bands(program, banded, size), rank).written()


class _BandWriter:
    """Writes a rank's program operation by operation."""

    def __init__(self, program: Program, bands: Bands, rank: int) -> None:
        self._whole, self._bands, self._rank = program, bands, rank
        self._values: list[Value] = []
        self._ops: list[Op] = []
        self._own: dict[Value, Value] = {}  # of the whole program's values
        self._has_neighbours = set(program.inputs.values())
        self._sums: dict[Value, Value] = {}

    def written(self) -> Program:
        inputs = {name: self._value_of(value) for name, value in self._whole.inputs.items()}
        for op in self._whole.ops:
            self._write(op)
        outputs = {name: self._output(value) for name, value in self._whole.outputs.items()}
        program = Program(tuple(self._values), inputs, outputs, tuple(self._ops))
        check_program(program)
        return program

    def _write(self, op: Op) -> None:
        match op:
            case Conv():
                self._bring_neighbours(op)
                self._ops.append(
                    replace(
                        op,
                        sums=self._image_sums(op),
                        out=self._value_of(op.out),
                        sources=self._all_of(op.sources),
                        channel_add=None if op.channel_add is None else self._part(op.channel_add),
                        residual=None if op.residual is None else self._own[op.residual],
                    )
                )
            case Linear():
                self._ops.append(
                    replace(
                        op,
                        out=self._value_of(op.out),
                        source=self._own[op.source],
                        residual=None if op.residual is None else self._own[op.residual],
                    )
                )
            case Attention():
                key, value = self._keys_and_values(op)
                out, query = self._value_of(op.out), self._part(op.query)
                self._ops.append(replace(op, out=out, query=query, key=key, value=value))
            case Normalize():
                sums = self._image_sums(op)
                out, sources = self._value_of(op.out), self._all_of(op.sources)
                self._ops.append(replace(op, out=out, sources=sources, sums=sums))
            case _:
                raise ValueError(f"{type(op).__name__} {op.name!r} cannot be divided into bands")

    def _part(self, part: Slice) -> Slice:
        return replace(part, value=self._own[part.value])

    def _all_of(self, values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(self._own[value] for value in values)

    def _output(self, value: Value) -> Value:
        if value not in self._bands:
            return self._own[value]
        return self._gather(Slice(value), value.channels)

    def _bring_neighbours(self, op: Conv) -> None:
        for source in op.sources:
            if source not in self._bands or source in self._has_neighbours:
                continue
            own, sent = self._own[source], self._bands.sent(source)
            if any(sent):
                self._ops.append(Move(f"{op.name}.rows", own, Slice(own), sent))
            self._has_neighbours.add(source)

    def _image_sums(self, op: Conv | Normalize) -> ImageSums | None:
        """What a group norm of a band goes by."""
        sources = op.sources
        if sources[0] not in self._bands or not isinstance(op.norm, GroupNorm):
            return None
        new = [source for source in sources if source not in self._sums]
        pivots = [self._pivots(source) for source in new]
        sums = [self._sum(source, pivot) for source, pivot in zip(new, pivots, strict=True)]
        for source, one in zip(new, sums, strict=True):
            self._sums[source] = self._whole_sums(source, one)
        return ImageSums(self._all_sums(sources), sources[0].tokens)

    def _all_sums(self, sources: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(self._sums[source] for source in sources)

    def _pivots(self, source: Value) -> Value | None:
        """The image's first pixel, which the first rank has."""
        own = self._own[source]
        pivots = self._new(Value(0, source.batch, 1, 1, 2 * source.channels))
        sent = ((0,), *[()] * (self._bands.size - 1))
        self._ops.append(Move("pivots", pivots, Slice(own), sent))
        return None if self._rank == 0 else pivots

    def _sum(self, source: Value, pivots: Value | None) -> Value:
        starts = self._sum_rows(source)
        first, last = starts[self._rank : self._rank + 2]
        shape = (source.batch, last - first, 1, 2 * source.channels)
        out = self._new(Value(0, *shape, first_row=first))
        self._ops.append(ChannelSums("sums", out, self._own[source], pivots))
        return out

    def _whole_sums(self, source: Value, sums: Value) -> Value:
        starts = self._sum_rows(source)
        whole = self._new(Value(0, source.batch, starts[-1], 1, sums.channels))
        rows = tuple(
            tuple(range(starts[rank], starts[rank + 1])) for rank in range(self._bands.size)
        )
        self._ops.append(Move("sums", whole, Slice(sums), rows))
        return whole

    def _sum_rows(self, source: Value) -> list[int]:
        """Where each rank's sums begin; the pivots go before the first rank's."""
        starts = [0]
        for rank in range(self._bands.size):
            band = replace(source, height=len(self._bands.rows(source, rank)))
            starts.append(starts[-1] + band.norm_chunks + (rank == 0))
        return starts

    def _keys_and_values(self, op: Attention) -> tuple[Slice, Slice]:
        """Of all tokens."""
        key, value, channels = op.key, op.value, op.out.channels
        if not (key.value in self._bands and value.value in self._bands):
            return self._part(key), self._part(value)
        if key.value == value.value and value.first == key.first + channels:
            both = self._gather(key, 2 * channels)
            return Slice(both), Slice(both, channels)
        return Slice(self._gather(key, channels)), Slice(self._gather(value, channels))

    def _gather(self, part: Slice, channels: int) -> Value:
        """These channels of all rows."""
        value, bands = part.value, self._bands
        whole = self._new(Value(0, value.batch, value.height, value.width, channels))
        rows = tuple(tuple(bands.rows(value, rank)) for rank in range(bands.size))
        self._ops.append(Move("rows", whole, replace(part, value=self._own[value]), rows))
        return whole

    def _value_of(self, value: Value) -> Value:
        if value not in self._own:
            self._own[value] = self._new(self._band_of(value))
        return self._own[value]

    def _band_of(self, value: Value) -> Value:
        if value not in self._bands:
            return value
        rows, seen = self._bands.rows(value, self._rank), self._bands.seen(value, self._rank)
        return replace(
            value,
            height=len(rows),
            first_row=rows.start,
            above=rows.start - seen.start,
            below=seen.stop - rows.stop,
        )

    def _new(self, value: Value) -> Value:
        value = replace(value, index=len(self._values))
        self._values.append(value)
        return value


def _seen_rows(op: Conv, rows: range) -> range:
    """The source's rows that these rows of the result see, also such as it has not."""
    first, last, top = rows.start, rows.stop, op.padding[0]
    if op.upsample:
        return range((first - top) // 2, (last - 1 - top + op.size - 1) // 2 + 1)
    if op.stride == 1 and op.size == 3:
        first -= first % WINOGRAD_ROWS
        last = min(last + -last % WINOGRAD_ROWS, op.out.height)
    return range(first * op.stride - top, (last - 1) * op.stride - top + op.size)


def _halvings(program: Program, banded: Collection[str]) -> dict[Value, int]:
    """How often the image's rows have been halved, for each value that belongs to it."""
    tallest = max(program.inputs[name].height for name in banded)
    found = {}
    for name in banded:
        value, halvings = program.inputs[name], 0
        while -(-tallest >> halvings) != value.height:
            halvings += 1
            if halvings > tallest:
                raise ValueError(f"the input {name!r} is no image of {tallest} rows")
        found[value] = halvings
    for op in program.ops:
        match op:
            case Conv() | Normalize():
                main, more = op.sources[0], op.sources[1:]
            case Linear():
                main, more = op.source, ()
            case Attention():
                main, more = op.query.value, ()
                if (op.key.value in found) != (op.value.value in found):
                    raise ValueError(f"{op.name!r} has keys of an image, or values, but not both")
            case _:
                raise ValueError(f"{type(op).__name__} {op.name!r} cannot be divided into bands")
        residual = op.residual if isinstance(op, Conv | Linear) else None
        beside = [*more, *([] if residual is None else [residual])]
        if any((value in found) != (main in found) for value in beside):
            raise ValueError(f"{op.name!r} reads an image beside something that is none")
        if main in found:
            change = 0
            if isinstance(op, Conv):
                change = int(op.stride == 2) - int(op.upsample)
            found[op.out] = found[main] + change
        elif any(value in found for value in op.reads()):
            raise ValueError(f"{op.name!r} reads an image, but makes none")
    return found
