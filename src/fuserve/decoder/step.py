"""What one engine step asks of an executor, whichever executor it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fuserve.architectures.spec import DecoderSpec
from fuserve.errors import RankFailedError
from fuserve.kernels.cache import BLOCK_SIZE_TOKENS as BLOCK_SIZE_TOKENS


def _no_rows() -> npt.NDArray[np.int32]:
    return np.zeros(0, dtype=np.int32)


def _no_hidden() -> npt.NDArray[np.float32]:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(slots=True)
class StepBatch:
    """Any mix of prefill chunks and decode tokens of several sequences.

    The tokens of sequence ``s`` are ``tokens[query_starts[s]:query_starts[s + 1]]``; their
    positions are consecutive, and every earlier position of the sequence is in the cache already.
    The executor sets ``hidden`` to the hidden states of ``hidden_rows``, after the last norm.
    """

    tokens: npt.NDArray[np.int32]  # [tokens]
    positions: npt.NDArray[np.int32]  # [tokens]
    query_starts: npt.NDArray[np.int32]  # [sequences + 1]
    block_tables: npt.NDArray[np.int32]  # [sequences, blocks], padded with -1
    logit_rows: npt.NDArray[np.int32]  # [rows], indices into tokens
    hidden_rows: npt.NDArray[np.int32] = field(default_factory=_no_rows)  # [hidden rows], as above
    hidden: npt.NDArray[np.float32] = field(default_factory=_no_hidden)  # [hidden rows, hidden]


class Executor(Protocol):
    """Runs whole steps of one model over its own paged KV cache."""

    spec: DecoderSpec
    num_blocks: int

    def step(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        """Run every layer over the batch; return logits  # [rows, vocab], set ``batch.hidden``."""
        ...

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole KV-cache blocks, each (from, to), in all layers."""
        ...


@runtime_checkable
class PipelinedExecutor(Executor, Protocol):
    """An executor of several processes, its ranks: it can have steps in flight, and can fail.

    Steps and copies take effect in the order in which they were called.

    Attributes:
        num_in_flight: steps that may have begun and not been finished.
        failure: why it cannot step, until it is restarted; None while it can. Any thread may read
            it.
    """

    num_in_flight: int
    failure: RankFailedError | None

    def begin(self, batch: StepBatch) -> None:
        """Start a step.

        Raises:
            RankFailedError: a rank has died, hangs or cannot be reached.
        """
        ...

    def finish(self) -> npt.NDArray[np.float32]:
        """Results of the oldest step that has begun, as those of ``step``.

        They are valid until ``num_in_flight`` further steps have begun.

        Raises:
            RankFailedError: as ``begin``.
        """
        ...

    def on_failure(self, notify: Callable[[], None]) -> None:
        """Call ``notify``, on a thread of the executor's, whenever ``failure`` is set."""
        ...

    def restart(self) -> None:
        """Start all ranks anew, with a cache of the same size and no contents.

        Raises:
            RankFailedError: it did not succeed; it may be tried again.
        """
        ...
