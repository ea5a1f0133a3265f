"""The arrays of a step, from the chunks the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch
from fuserve.engine.sequence import Chunk

Rows = npt.NDArray[np.float32]


def build_step(chunks: Items[Chunk]) -> StepBatch:
    """One StepBatch of the chunks in their order, which asks for the rows they want."""
    tokens: list[int] = []
    positions: list[int] = []
    query_starts = [0]
    logit_rows: list[int] = []
    hidden_rows: list[int] = []
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        to_row = len(tokens) - chunk.start
        tokens += chunk.sequence.tokens[chunk.start : end]
        tokens += chunk.draft_tokens
        positions += range(chunk.start, chunk.start + chunk.num_step_tokens)
        query_starts.append(len(tokens))
        logit_rows += (position + to_row for position in chunk.logit_positions)
        hidden_rows += (position + to_row for position in chunk.hidden_positions)
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
        hidden_rows=np.array(hidden_rows, dtype=np.int32),
    )


@dataclass(frozen=True, slots=True)
class ChunkResults:
    """What a step computed for one chunk.

    Attributes:
        chunk: the chunk.
        prompt_logits: of the prompt tokens that are scored  # [rows, vocab]
        next_logits: those that choose the next token, then those behind each draft; none unless
            the chunk samples  # [1 + drafts, vocab]
        prompt_hidden: hidden states that are read  # [rows, hidden]
    """

    chunk: Chunk
    prompt_logits: Rows
    next_logits: Rows
    prompt_hidden: Rows


def split_rows(chunks: Items[Chunk], logits: Rows, hidden: Rows) -> list[ChunkResults]:
    """Each chunk with its own rows of a step's results."""
    results: list[ChunkResults] = []
    logit_start = hidden_start = 0
    for chunk in chunks:
        logit_end = logit_start + len(chunk.logit_positions)
        hidden_end = hidden_start + len(chunk.hidden_positions)
        next_start = logit_end - (1 + len(chunk.draft_tokens) if chunk.samples else 0)
        results.append(
            ChunkResults(
                chunk,
                logits[logit_start:next_start],
                logits[next_start:logit_end],
                hidden[hidden_start:hidden_end],
            )
        )
        logit_start, hidden_start = logit_end, hidden_end
    return results
