"""The arrays of a step, from the chunks the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from fuserve.decoder.step import StepBatch
from fuserve.engine.sequence import Chunk


def build_step(chunks: Items[Chunk]) -> StepBatch:
    """One StepBatch of the chunks in their order.

    It asks for logits of the last token of every chunk that samples, in the same order.
    """
    tokens: list[int] = []
    positions: list[int] = []
    query_starts = [0]
    logit_rows: list[int] = []
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        tokens += chunk.sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        query_starts.append(len(tokens))
        if chunk.samples:
            logit_rows.append(len(tokens) - 1)
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    block_tables = np.full((len(chunks), width), -1, dtype=np.int32)
    for row, chunk in zip(block_tables, chunks, strict=True):
        row[: len(chunk.sequence.blocks)] = chunk.sequence.blocks
    return StepBatch(
        tokens=np.array(tokens, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        query_starts=np.array(query_starts, dtype=np.int32),
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, dtype=np.int32),
    )
