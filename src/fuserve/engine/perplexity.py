"""Perplexity of a text under a model, by strided windows.

The text is cut into windows of ``context`` tokens that begin ``stride`` tokens apart. The first
window scores all its tokens but the first; a later one scores only the tokens past its overlap
with the window before. So every token of the text but the first is scored exactly once, and past
the first window with at least ``context - stride`` tokens before it. Without overlap
(``stride == context``) the first token of each window has nothing before it and is not scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import Executor
from fuserve.engine.direct import Chunk, FixedSlots
from fuserve.errors import InvalidRequestError

_ROWS_AT_ONCE = 32  # rows widened to float64 together: 32 x 256k vocabulary is 64 MB


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start:end`` of the text, of which ``score_from:end`` are scored."""

    start: int
    end: int
    score_from: int


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """``perplexity`` is ``exp(total_nll / scored_tokens)``; ``total_nll`` is in nats."""

    perplexity: float
    total_nll: float
    scored_tokens: int
    text_tokens: int
    computed_tokens: int
    windows: int
    seconds: float


def check_window_sizes(context: int, stride: int) -> None:
    """Raise InvalidRequestError unless ``context >= 2`` and ``1 <= stride <= context``."""
    if context < 2:
        raise InvalidRequestError(f"the context is {context}; at least 2 tokens are needed.")
    if not 1 <= stride <= context:
        raise InvalidRequestError(
            f"the stride is {stride}; it must lie between 1 and the context, {context}."
        )


def windows_of(num_tokens: int, context: int, stride: int) -> list[Window]:
    """Cut a text of ``num_tokens`` into windows.

    Raises:
        InvalidRequestError: unless ``num_tokens >= 2``, ``context >= 2`` and
            ``1 <= stride <= context``.
    """
    check_window_sizes(context, stride)
    if num_tokens < 2:
        raise InvalidRequestError(
            f"the text has {num_tokens} tokens; at least 2 are needed to predict one."
        )
    windows: list[Window] = []
    scored_to = 1
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        windows.append(Window(start, end, scored_to))
        scored_to = end
        if end == num_tokens:
            break
    return windows


def measure_perplexity(
    executor: Executor,
    tokens: Sequence[int],
    *,
    context: int,
    stride: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Score a text with an executor whose cache holds ``max_num_seqs`` windows.

    Args:
        executor: any executor; positions start at 0 in each window.
        tokens: the text.
        context: tokens of a window.
        stride: tokens between the beginnings of windows.
        max_num_seqs: windows that may run in one step.
        max_num_batched_tokens: token budget of a step; longer windows run in chunks.
        progress: called with the windows done and the windows in all.

    Raises:
        InvalidRequestError: if context, stride and text do not fit together.
        CapacityError: if the cache is too small.
    """
    text = np.asarray(tokens, dtype=np.int32)  # [tokens]
    windows = windows_of(len(text), context, stride)
    slots = FixedSlots(min(max_num_seqs, len(windows)), min(context, len(text)))
    slots.check_fits(executor.num_blocks)
    started = time.perf_counter()
    total_nll = 0.0
    computed = scored = 0
    for chunks, targets, windows_done in scored_steps(text, windows, slots, max_num_batched_tokens):
        logits = executor.step(slots.step_batch(chunks))  # [rows, vocab]
        total_nll += negative_log_likelihood(logits, targets)
        computed += sum(len(chunk.tokens) for chunk in chunks)
        scored += len(targets)
        if progress is not None:
            progress(windows_done, len(windows))
    return PerplexityResult(
        perplexity=math.exp(min(total_nll / scored, 700.0)),
        total_nll=total_nll,
        scored_tokens=scored,
        text_tokens=len(text),
        computed_tokens=computed,
        windows=len(windows),
        seconds=time.perf_counter() - started,
    )


def negative_log_likelihood(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> float:
    """Sum over rows of ``-log softmax(logits)[target]``, in float64.

    Args:
        logits: ``[rows, vocab]``.
        targets: ``[rows]``.
    """
    total = 0.0
    for begin in range(0, len(targets), _ROWS_AT_ONCE):
        block = logits[begin : begin + _ROWS_AT_ONCE].astype(np.float64)
        wanted = targets[begin : begin + _ROWS_AT_ONCE]
        peak = block.max(axis=1)
        log_sum = peak + np.log(np.exp(block - peak[:, None]).sum(axis=1))
        total += float((log_sum - block[np.arange(len(wanted)), wanted]).sum())
    return total


def scored_steps(
    text: npt.NDArray[np.int32], windows: Sequence[Window], slots: FixedSlots, budget: int
) -> Iterator[tuple[list[Chunk], npt.NDArray[np.int32], int]]:
    """Fill steps with chunks of windows, in order; a window keeps its slot until it is done.

    Yields the chunks of a step, the tokens that its rows of logits should predict, and how many
    windows are done.
    """
    chunks: list[Chunk] = []
    targets: list[npt.NDArray[np.int32]] = []
    room = budget
    for index, window in enumerate(windows):
        done = window.start
        while done < window.end - 1:  # the last token is only predicted, never an input
            if room == 0 or len(chunks) == slots.num_slots:
                yield chunks, np.concatenate(targets), index
                chunks, targets, room = [], [], budget
            take = min(room, window.end - 1 - done)
            first_row = min(max(window.score_from - 1 - done, 0), take)
            chunks.append(
                Chunk(
                    index % slots.num_slots,
                    done - window.start,
                    text[done : done + take],
                    first_row,
                )
            )
            targets.append(text[done + first_row + 1 : done + take + 1])
            done += take
            room -= take
    if chunks:
        yield chunks, np.concatenate(targets), len(windows)
