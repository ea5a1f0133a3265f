"""Strided perplexity scores each token once, with the context it should have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.engine.perplexity import measure_perplexity, negative_log_likelihood, windows_of
from fuserve.errors import CapacityError, InvalidRequestError
from tests.engine.text_executor import VOCAB_SIZE, TextExecutor, logits_after


def surprise(context: np.ndarray, target: int) -> float:
    """-log p(target | context), the plain way."""
    logits = logits_after(context).astype(np.float64)
    return float(np.log(np.exp(logits).sum()) - logits[target])


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(2, 120),
    context=st.integers(2, 70),
    data=st.data(),
    seqs=st.integers(1, 5),
    budget=st.integers(1, 150),
)
def test_any_batching_gives_the_sum_over_windows_computed_one_by_one(
    num_tokens: int, context: int, data: st.DataObject, seqs: int, budget: int
) -> None:
    stride = data.draw(st.integers(1, context))
    text = np.random.default_rng(num_tokens).integers(0, VOCAB_SIZE, num_tokens, dtype=np.int32)
    expected, scored = 0.0, 0
    previous_end = 0
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        for target in range(max(previous_end, start + 1), end):
            expected += surprise(text[start:target], int(text[target]))
            scored += 1
        previous_end = end
        if end == num_tokens:
            break

    executor = TextExecutor(num_blocks=5 * 4)
    result = measure_perplexity(
        executor,
        text.tolist(),
        context=context,
        stride=stride,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
    )

    assert result.scored_tokens == scored
    assert result.total_nll == pytest.approx(expected, rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(expected / scored), rel=1e-9)
    assert all(len(batch.tokens) <= budget for batch in executor.batches)
    assert all(len(batch.query_starts) - 1 <= seqs for batch in executor.batches)
    assert sum(len(batch.logit_rows) for batch in executor.batches) == scored


def test_with_overlap_every_token_but_the_first_is_scored() -> None:
    windows = windows_of(1000, 512, 256)
    scored = [token for window in windows for token in range(window.score_from, window.end)]
    assert scored == list(range(1, 1000))
    assert all(window.score_from - window.start >= 256 for window in windows[1:])


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    logits = np.full((70, 1000), 7.25, dtype=np.float32)
    nll = negative_log_likelihood(logits, np.arange(70, dtype=np.int32))
    assert math.exp(nll / 70) == pytest.approx(1000, rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, 0.0], [-3e4, -3e4]], dtype=np.float32)
    nll = negative_log_likelihood(logits, np.array([0, 1], dtype=np.int32))
    assert nll == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride", "message"),
    [
        (100, 16, 0, "stride is 0"),
        (100, 16, 17, "between 1 and the context, 16"),
        (1, 16, 8, "text has 1 tokens"),
        (100, 1, 1, "context is 1"),
    ],
)
def test_impossible_windows_are_refused(
    num_tokens: int, context: int, stride: int, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        windows_of(num_tokens, context, stride)


def test_a_cache_that_is_too_small_is_refused_before_any_step() -> None:
    executor = TextExecutor(num_blocks=3)
    with pytest.raises(CapacityError, match=r"need 4 KV-cache\s+blocks, the cache has 3"):
        measure_perplexity(
            executor,
            [1] * 200,
            context=64,
            stride=32,
            max_num_seqs=2,
            max_num_batched_tokens=64,
        )
    assert executor.batches == []
