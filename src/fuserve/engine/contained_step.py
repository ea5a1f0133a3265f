"""A step whose failure is contained: only the sequences that make it fail are lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from fuserve.engine.sequence import Chunk

Result = TypeVar("Result")


class Contained(NamedTuple, Generic[Result]):
    """What came of a step: chunks with their common result, and chunks with their errors."""

    done: list[tuple[list[Chunk], Result]]
    failed: list[tuple[Chunk, Exception]]


def run_contained(run: Callable[[list[Chunk]], Result], chunks: list[Chunk]) -> Contained[Result]:
    """Run the chunks in one step; if that fails, run each in a step of its own.

    A step may be repeated: it writes the same keys and values to the same places. Alone, a chunk
    has the same result as in company.
    """
    try:
        return Contained([(chunks, run(chunks))], [])
    except Exception as error:
        if len(chunks) == 1:
            return Contained([], [(chunks[0], error)])
    contained: Contained[Result] = Contained([], [])
    for chunk in chunks:
        try:
            contained.done.append(([chunk], run([chunk])))
        except Exception as error:
            contained.failed.append((chunk, error))
    return contained
