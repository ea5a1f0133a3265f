"""A model over several processes answers as it does in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fuserve import LLM, SamplingParams
from fuserve.engine.outputs import RequestOutput
from fuserve.errors import InvalidRequestError
from tests.engine.driving import finish_all, run_together
from tests.engine.pipelined_jobs import JOBS
from tests.parallel.small_groups import group_of, make_engine, resources, small_group, write_config

PROMPTS = ["The capital of France is", "Once upon a time", "1, 2, 3, 4,", "def add(a, b):"]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    assert all(output.error is None for output in outputs)
    return [completion.token_ids for output in outputs for completion in output.outputs]


def demo_tokens(
    tensor: int, pipeline: int, *, rank_invariant: bool = True
) -> list[tuple[int, ...]]:
    with LLM(
        "demo",
        dtype="float32",
        rank_invariant=rank_invariant,
        max_model_len=256,
        max_num_seqs=8,
        num_threads=1,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    ) as llm:
        return tokens(llm.generate(PROMPTS, GREEDY))


@pytest.fixture(scope="module")
def unkept() -> Iterator[None]:
    """Half a gigabyte of packed weights a time need not go to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSERVE_CACHE", "/dev/null")
        yield


@pytest.fixture(scope="module")
def demo_alone(unkept: None) -> list[tuple[int, ...]]:
    return demo_tokens(1, 1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_smollm2_says_the_same_over_any_ranks(
    tensor: int, pipeline: int, demo_alone: list[tuple[int, ...]]
) -> None:
    assert demo_tokens(tensor, pipeline) == demo_alone


def test_smollm2_says_the_same_in_float32_without_a_fixed_order_of_sums(
    demo_alone: list[tuple[int, ...]],
) -> None:
    assert demo_tokens(2, 1, rank_invariant=False) == demo_alone


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 3), (2, 2)])
def test_all_that_requests_can_ask_is_the_same_over_ranks(
    tensor: int, pipeline: int, tmp_path: Path
) -> None:
    """Branches, prompt scores, embeddings and blocks that are copied, through the pipeline."""
    config = write_config(tmp_path)
    before = resources()
    results = []
    for sizes in ((1, 1), (tensor, pipeline)):
        with small_group(config, *sizes) as loaded:
            engine = make_engine(loaded)
            outputs = run_together(engine, JOBS)
            embedded = engine.add_embedding([*range(90)], "mean")
            vector = finish_all(engine)[embedded].embedding
            assert vector is not None
            results.append((tokens(outputs), vector))
    (alone, vector_alone), (over_ranks, vector_over_ranks) = results
    assert over_ranks == alone
    np.testing.assert_allclose(vector_over_ranks, vector_alone, atol=1e-4)
    after = resources()
    assert after == before


def test_a_group_reports_all_of_its_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with small_group(config) as loaded:
        alone = loaded.report
    with small_group(config, pipeline=2) as loaded:
        reports = group_of(loaded).reports
        assert len(reports) == 2
        assert loaded.report.packed_bytes == alone.packed_bytes
        assert loaded.report.num_threads == 2
        assert loaded.report.formats == alone.formats
        # Each has about half; the KV cache belongs to layers.
        assert max(r.packed_bytes for r in reports) < 0.6 * alone.packed_bytes
        assert {r.kv_cache_bytes for r in reports} == {loaded.report.kv_cache_bytes // 2}


def test_measured_balance_makes_stages_of_all_layers(tmp_path: Path) -> None:
    from fuserve.decoder.load import open_weights
    from fuserve.decoder.options import ExecutorOptions
    from fuserve.parallel.layer_costs import layer_seconds

    options = ExecutorOptions(load_format="dummy", num_threads=1)
    _, weights = open_weights(str(write_config(tmp_path, vocab_size=60000)), options)
    costs = layer_seconds(weights, options)
    assert len(costs) == 4
    assert costs[1] == costs[2] > 0
    assert costs[-1] > 2 * costs[1]  # the head; the embedding costs next to nothing


def test_the_reference_executor_runs_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="one process"):
        LLM(
            str(write_config(tmp_path)),
            load_format="dummy",
            executor="reference",
            pipeline_parallel_size=2,
        )
