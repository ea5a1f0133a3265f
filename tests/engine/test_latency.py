"""The latency measurement runs the steps it claims to run."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.engine.direct import FixedSlots
from fuserve.engine.latency import StepRunner, measure_latency
from fuserve.errors import CapacityError
from tests.engine.text_executor import VOCAB_SIZE, TextExecutor, logits_after


def test_prefill_in_chunks_and_greedy_decoding_follow_the_model() -> None:
    executor = TextExecutor(num_blocks=2 * 3)
    runner = StepRunner(executor, FixedSlots(2, 70), budget=16)
    prompts = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=(2, 50), dtype=np.int32)

    first = [runner.prefill(slot, prompts[slot])[0] for slot in range(2)]
    runner.decode(np.array(first, dtype=np.int32), context=50, steps=20)

    for slot in range(2):
        text = prompts[slot].tolist()
        for _ in range(20):
            text.append(int(logits_after(np.array(text)).argmax()))
        held = executor.cache[slot * 3 : slot * 3 + 3].ravel()[:70]
        assert held.tolist() == text


def test_every_batch_size_decodes_from_the_same_context() -> None:
    executor = TextExecutor(num_blocks=3 * 2)
    result = measure_latency(
        executor,
        prompt_tokens=40,
        output_tokens=5,
        batches=[1, 3],
        repeat=2,
        max_num_batched_tokens=64,
    )
    decode_steps = [batch for batch in executor.batches if batch.positions.min() >= 40]
    assert [len(batch.tokens) for batch in decode_steps] == [*[1] * 5, *[3] * 5] * 2
    assert {int(batch.positions.max()) for batch in decode_steps} == {40, 41, 42, 43, 44}
    assert [speed.batch for speed in result.decode] == [1, 3]
    assert all(speed.tokens_per_s > 0 for speed in result.decode)
    assert result.prefill_runs == 3  # each of the three sequences once, more than two repeats


def test_progress_ends_at_its_total() -> None:
    told: list[tuple[str, int, int]] = []
    measure_latency(
        TextExecutor(num_blocks=2),
        prompt_tokens=4,
        output_tokens=2,
        batches=[2],
        repeat=3,
        max_num_batched_tokens=8,
        progress=lambda *news: told.append(news),
    )
    assert told[0] == ("prefill", 1, 6)
    assert told[-1] == ("decode", 6, 6)


def test_more_sequences_than_the_cache_holds_are_refused() -> None:
    with pytest.raises(CapacityError, match="16 sequences of 48 tokens"):
        measure_latency(
            TextExecutor(num_blocks=31),
            prompt_tokens=40,
            output_tokens=8,
            batches=[1, 16],
            repeat=1,
            max_num_batched_tokens=64,
        )
