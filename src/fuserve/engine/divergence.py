"""How far a model's predictions of a text are from those of another: what quantization costs.

Perplexity alone can hide an error, as a wrong token may happen to be the text's. The mean
Kullback-Leibler divergence from the base's distribution counts every change of every prediction,
and the share of equal first choices tells how often greedy decoding would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import Executor
from fuserve.engine.direct import FixedSlots
from fuserve.engine.perplexity import scored_steps, windows_of

_ROWS_AT_ONCE = 32  # rows widened to float64 together

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model beside its base on one text.

    Attributes:
        perplexity: of the model.
        base_perplexity: of the base.
        mean_kl: mean of ``KL(base || model)`` over predicted tokens, in nats.
        top1_agreement: share of predictions whose likeliest token is the base's.
        scored_tokens: how many tokens were predicted.
    """

    perplexity: float
    base_perplexity: float
    mean_kl: float
    top1_agreement: float
    scored_tokens: int

    @property
    def perplexity_change(self) -> float:
        """By what share the perplexity is larger than the base's."""
        return self.perplexity / self.base_perplexity - 1.0


@dataclass(slots=True)
class _Sums:
    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    tokens: int = 0

    def add(
        self,
        logits: npt.NDArray[np.float32],
        base_logits: npt.NDArray[np.float32],
        targets: npt.NDArray[np.int32],
    ) -> None:
        """Count rows of both models' logits  # [rows, vocab] with the tokens that came  # [rows]"""
        for begin in range(0, len(targets), _ROWS_AT_ONCE):
            block = slice(begin, begin + _ROWS_AT_ONCE)
            ours, base = _log_softmax(logits[block]), _log_softmax(base_logits[block])
            rows, wanted = np.arange(len(ours)), targets[block]
            self.nll -= float(ours[rows, wanted].sum())
            self.base_nll -= float(base[rows, wanted].sum())
            self.kl += float((np.exp(base) * (base - ours)).sum())
            self.agreements += int((ours.argmax(axis=1) == base.argmax(axis=1)).sum())
            self.tokens += len(ours)


def measure_divergence(
    base: Executor,
    model: Executor,
    tokens: Sequence[int],
    *,
    context: int,
    stride: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Run both over the same windows of a text, as ``measure_perplexity`` cuts it.

    Logits of two models for one step are all that is held: whole texts of them would be large.

    Args:
        base: what is compared with, usually the model in fp32.
        model: another executor of the same vocabulary.
        tokens: the text.
        context: tokens of a window.
        stride: tokens between the beginnings of windows.
        max_num_seqs: windows that may run in one step.
        max_num_batched_tokens: token budget of a step.
        progress: called with the windows done and the windows in all.

    Raises:
        InvalidRequestError: if context, stride and text do not fit together.
        CapacityError: if a cache is too small.
    """
    text = np.asarray(tokens, dtype=np.int32)  # [tokens]
    windows = windows_of(len(text), context, stride)
    slots = FixedSlots(min(max_num_seqs, len(windows)), min(context, len(text)))
    for executor in (base, model):
        slots.check_fits(executor.num_blocks)
    sums = _Sums()
    for chunks, targets, done in scored_steps(text, windows, slots, max_num_batched_tokens):
        batch = slots.step_batch(chunks)
        sums.add(model.step(batch), base.step(batch), targets)
        if progress is not None:
            progress(done, len(windows))
    return Divergence(
        perplexity=math.exp(min(sums.nll / sums.tokens, 700.0)),
        base_perplexity=math.exp(min(sums.base_nll / sums.tokens, 700.0)),
        mean_kl=sums.kl / sums.tokens,
        top1_agreement=sums.agreements / sums.tokens,
        scored_tokens=sums.tokens,
    )


def _log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Log probabilities in float64  # [rows, vocab]"""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
