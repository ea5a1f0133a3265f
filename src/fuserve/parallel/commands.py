"""What rank 0 tells the others to do, as bytes: a step, a copy of cache blocks, or to stop.

A command is a line of int32: its kind, then counts, then arrays one after another. Commands are
executed in the order in which they are sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch

_STOP, _COPY, _STEP, _NOTHING = range(4)
_NUM_COUNTS = 6

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """Run a step; ``number`` counts the steps of the group."""

    number: int
    batch: StepBatch


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy KV-cache blocks, each (from, to)."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """Sent now and then while nothing else is, so that nobody is taken for dead."""


Command = Step | Copy | Stop | Nothing


def encode(command: Command) -> Words:
    """The command as a line of int32."""
    if isinstance(command, Stop):
        return np.array([_STOP], np.int32)
    if isinstance(command, Nothing):
        return np.array([_NOTHING], np.int32)
    if isinstance(command, Copy):
        flat = [block for pair in command.pairs for block in pair]
        return np.array([_COPY, *flat], np.int32)
    batch = command.batch
    num_sequences, width = batch.block_tables.shape
    counts = [
        _STEP,
        command.number,
        len(batch.tokens),
        num_sequences,
        width,
        len(batch.logit_rows),
        len(batch.hidden_rows),
    ]
    return np.concatenate(
        [
            np.array(counts, np.int32),
            batch.tokens,
            batch.positions,
            batch.query_starts,
            batch.block_tables.reshape(-1),
            batch.logit_rows,
            batch.hidden_rows,
        ],
        dtype=np.int32,
    )


def decode(words: Words) -> Command:
    """The command of a line; a step's arrays are views of it.

    Raises:
        ValueError: it is none.
    """
    kind = int(words[0])
    if kind == _STOP:
        return Stop()
    if kind == _NOTHING:
        return Nothing()
    if kind == _COPY:
        pairs = words[1:].reshape(-1, 2).tolist()
        return Copy(tuple((source, target) for source, target in pairs))
    if kind != _STEP:
        raise ValueError(f"a command of unknown kind {kind}")
    number, num_tokens, num_sequences, width, num_logits, num_hidden = words[
        1 : 1 + _NUM_COUNTS
    ].tolist()
    sizes = [
        num_tokens,
        num_tokens,
        num_sequences + 1,
        num_sequences * width,
        num_logits,
        num_hidden,
    ]
    tokens, positions, starts, tables, logit_rows, hidden_rows, rest = np.split(
        words[1 + _NUM_COUNTS :], np.cumsum(sizes)
    )
    if len(rest) or len(hidden_rows) != num_hidden:
        raise ValueError("a step's command has not the length that it says")
    batch = StepBatch(
        tokens, positions, starts, tables.reshape(num_sequences, width), logit_rows, hidden_rows
    )
    return Step(number, batch)


def copies(pairs: Iterable[tuple[int, int]]) -> Copy:
    """A copy of these pairs."""
    return Copy(tuple((int(source), int(target)) for source, target in pairs))
