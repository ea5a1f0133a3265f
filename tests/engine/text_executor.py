"""An executor whose logits depend on every earlier token, read through the block table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fuserve.architectures import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
)
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, StepBatch

VOCAB_SIZE = 11


def logits_after(context: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The toy model: logits after all tokens of ``context``  # [vocab]."""
    seed = np.frombuffer(np.asarray(context, dtype=np.int32).tobytes(), dtype=np.uint32)
    return np.random.default_rng(seed).normal(0, 3, VOCAB_SIZE).astype(np.float32)


class TextExecutor:
    """Keeps tokens where a real executor keeps keys and values.

    A token that is read back from a wrong block, or a position that was never written, changes
    the logits or raises.
    """

    def __init__(self, num_blocks: int) -> None:
        norm = NormSpec("rms", 1e-5)
        self.spec = DecoderSpec(
            family="toy",
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            max_position=4096,
            norm=norm,
            attention=AttentionSpec(1, 1, 8, 1.0),
            feed_forward=FeedForwardSpec(8, True, "silu"),
            layers=(LayerSpec(None),),
        )
        self.num_blocks = num_blocks
        self.cache = np.full((num_blocks, BLOCK_SIZE_TOKENS), -1, dtype=np.int32)
        self.batches: list[StepBatch] = []

    def step(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        self.batches.append(batch)
        contexts: list[npt.NDArray[np.int32]] = []
        for sequence, (begin, end) in enumerate(
            zip(batch.query_starts[:-1], batch.query_starts[1:], strict=True)
        ):
            for row in range(begin, end):
                position = int(batch.positions[row])
                block = batch.block_tables[sequence, position // BLOCK_SIZE_TOKENS]
                assert block >= 0, "a token is written to a block that the table lacks"
                self.cache[block, position % BLOCK_SIZE_TOKENS] = batch.tokens[row]
                history = self.cache[batch.block_tables[sequence]].ravel()[: position + 1]
                assert (history >= 0).all(), "an earlier position was never written"
                contexts.append(history.copy())
        rows = [logits_after(contexts[row]) for row in batch.logit_rows]
        return np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB_SIZE)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.cache[target] = self.cache[source]
