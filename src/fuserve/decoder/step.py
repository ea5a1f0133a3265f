"""What one engine step asks of an executor, whichever executor it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fuserve.architectures.spec import DecoderSpec
from fuserve.kernels.cache import BLOCK_SIZE_TOKENS as BLOCK_SIZE_TOKENS


@dataclass(slots=True)
class StepBatch:
    """Any mix of prefill chunks and decode tokens of several sequences.

    The tokens of sequence ``s`` are ``tokens[query_starts[s]:query_starts[s + 1]]``; their
    positions are consecutive, and every earlier position of the sequence is in the cache already.
    """

    tokens: npt.NDArray[np.int32]  # [tokens]
    positions: npt.NDArray[np.int32]  # [tokens]
    query_starts: npt.NDArray[np.int32]  # [sequences + 1]
    block_tables: npt.NDArray[np.int32]  # [sequences, blocks], padded with -1
    logit_rows: npt.NDArray[np.int32]  # [rows], indices into tokens


class Executor(Protocol):
    """Runs whole steps of one model over its own paged KV cache."""

    spec: DecoderSpec
    num_blocks: int

    def step(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        """Run every layer over the batch; return logits  # [rows, vocab]."""
        ...
