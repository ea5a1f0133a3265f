"""Running a rank's part of a program whose image is made by several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights
from fuserve.diffusion.program import Array, Move, Program, Value
from fuserve.diffusion.rank_bands import band_program

Memory = Callable[[Value], Array]


class Gatherer(Protocol):
    """What ranks need of each other to make an image together.

    Attributes:
        rank: this rank.
        size: how many ranks there are.
    """

    rank: int
    size: int

    def all_gather(self, parts: Sequence[Array]) -> None:
        """Bring every rank's part to all ranks.

        Args:
            parts: one contiguous array for each rank, of sizes that may differ but are the same in
                all ranks. ``parts[rank]`` is this rank's; the others are filled in.

        Raises:
            FuserveError: a rank does not answer.
        """
        ...


class RankExecutor:
    """See ``Executor``: gives, in every rank, all of the outputs.

    All ranks run the same programs with the same inputs, in the same order.

    Args:
        program: of the whole image.
        banded: the names of its inputs that belong to the image.
        weights: of its checkpoint.
        workspace: where this rank's part runs.
        ranks: to exchange with.

    Raises:
        InvalidRequestError: the image has fewer rows than ranks at its coarsest resolution.
        CheckpointError: a tensor is missing.
        ValueError: an operation is in no form that the kernels have.
    """

    def __init__(
        self,
        program: Program,
        banded: Sequence[str],
        weights: PackedWeights,
        workspace: NativeWorkspace,
        ranks: Gatherer,
    ) -> None:
        self._program, self._ranks = program, ranks
        self._own = band_program(program, banded, ranks.rank, ranks.size)
        self._native = NativeProgram(self._own, weights, workspace)
        self._parts = _parts(self._own)

    @property
    def program(self) -> Program:
        """The whole image's program."""
        return self._program

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, from inputs of the whole image.

        Raises:
            FuserveError: a rank does not answer.
            ValueError: an input is missing, unknown or of another size.
        """
        arrays, outputs = self._native.bind(
            {name: self._seen(name, array) for name, array in inputs.items()}
        )
        memory = self._native.memory(arrays)
        for part in self._parts:
            if part.moves:
                _exchange(part.moves, self._ranks, memory)
            else:
                self._native.run_part(arrays, part.first, part.last)
        return outputs

    def _seen(self, name: str, array: Array) -> Array:
        """The rows of an input that this rank sees."""
        whole, own = self._program.inputs.get(name), self._own.inputs.get(name)
        if whole is None or own is None or whole.height == own.height:
            return array
        rows = np.asarray(array, np.float32).reshape(whole.shape)
        seen: Array = rows[:, own.first_row - own.above : own.first_row + own.height + own.below]
        return seen


@dataclass(frozen=True, slots=True)
class _Part:
    """Operations ``[first, last)`` that run here, or moves, which are one exchange."""

    first: int
    last: int
    moves: tuple[Move, ...]


def _parts(program: Program) -> list[_Part]:
    parts, first = [], 0
    for _, run in groupby(program.ops, key=lambda op: isinstance(op, Move)):
        ops = tuple(run)
        moves = tuple(op for op in ops if isinstance(op, Move))
        parts.append(_Part(first, first + len(ops), moves))
        first += len(ops)
    return parts


def _exchange(moves: Sequence[Move], ranks: Gatherer, memory: Memory) -> None:
    """All that these moves bring, in one message of each rank to the others."""
    shapes = [[_sent_shape(move, rank) for move in moves] for rank in range(ranks.size)]
    sizes = [[int(np.prod(shape)) for shape in each] for each in shapes]
    parts = [np.empty(sum(each), np.float32) for each in sizes]
    cut = [np.split(part, np.cumsum(each)[:-1]) for part, each in zip(parts, sizes, strict=True)]
    for index, move in enumerate(moves):
        sent = cut[ranks.rank][index].reshape(shapes[ranks.rank][index])
        source = move.source.value
        rows = np.array(move.rows[ranks.rank], np.intp) - source.first_row + source.above
        channels = slice(move.source.first, move.source.first + move.channels)
        sent[...] = memory(source)[:, _run(rows), : move.out.width, channels]
    ranks.all_gather(parts)
    for index, move in enumerate(moves):
        out = memory(move.out)
        for rank in range(ranks.size):
            received = cut[rank][index].reshape(shapes[rank][index])
            rows = np.array(move.rows[rank], np.intp)
            wanted = _wanted(move, rows)
            to = rows[wanted] - move.out.first_row + move.out.above
            out[:, _run(to), :, : move.channels] = received[:, _run(np.flatnonzero(wanted))]


def _sent_shape(move: Move, rank: int) -> tuple[int, int, int, int]:
    """Of what a rank sends."""
    return (move.out.batch, len(move.rows[rank]), move.out.width, move.channels)


def _wanted(move: Move, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Which of these rows of the image ``out`` has room for, and gets from another."""
    out = move.out
    first, last = out.first_row, out.first_row + out.height
    has_room = (rows >= first - out.above) & (rows < last + out.below)
    return has_room & ~((rows >= first) & (rows < last)) if move.is_inner else has_room


def _run(rows: npt.NDArray[np.intp]) -> slice | npt.NDArray[np.intp]:
    """The same rows as a slice where they follow each other: it copies faster."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
