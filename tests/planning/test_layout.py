"""A model is cut into stages and slices that are as even as they can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.storage_plan import plan_storage
from fuserve.planning.layout import CutModel, balanced, cuts_evenly
from fuserve.planning.model import ConfigWeights
from tests.planning.shapes import LLAMA, OPT_175B


@given(
    layers=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    first=st.integers(0, 60),
    last=st.integers(0, 60),
    data=st.data(),
)
def test_no_cut_into_stages_has_a_lighter_heaviest_stage(
    layers: list[int], first: int, last: int, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))
    counts = balanced(layers, first, last, num_stages)
    assert sum(counts) == len(layers)
    assert min(counts) >= 1

    def heaviest(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(layers)]
        weights = [sum(layers[start:stop]) for start, stop in pairwise(edges)]
        weights[0] += first
        weights[-1] += last
        return max(weights)

    cuts = tuple(sum(counts[:stage]) for stage in range(1, num_stages))
    every = combinations(range(1, len(layers)), num_stages - 1)
    assert heaviest(cuts) == min(map(heaviest, every))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_slices_and_stages_hold_the_whole_model(quantization: str | None) -> None:
    weights = ConfigWeights(LLAMA)
    options = ExecutorOptions(quantization=quantization)  # type: ignore[arg-type]
    plan, _ = plan_storage(weights, options)
    whole = sum(tensor.num_bytes for tensor in plan.values())
    head = plan["embedding"].num_bytes  # tied: it stands on the first and on the last stage
    (stage,) = CutModel(weights.spec, plan, 1).stages(1)
    assert stage.weight_bytes == whole
    in_three = CutModel(weights.spec, plan, 1).stages(3)
    assert sum(stage.weight_bytes for stage in in_three) == whole + head
    (half,) = CutModel(weights.spec, plan, 2).stages(1)
    norms = sum(tensor.num_bytes for tensor in plan.values() if tensor.storage is None)
    assert half.weight_bytes == (whole - norms) // 2 + norms


def test_few_kv_heads_are_held_by_several_ranks() -> None:
    weights = ConfigWeights(LLAMA)  # 8 heads, 2 KV heads
    plan, _ = plan_storage(weights, ExecutorOptions())

    def layer_weights(ranks: int) -> int:
        (stage,) = CutModel(weights.spec, plan, ranks).stages(1)
        (products,) = stage.layers
        return products.num_weights

    others, keys_and_values = 6 * (2 * 256 * 256 + 3 * 512 * 256), 6 * 2 * 64 * 256
    for ranks in (1, 2, 4, 8):
        expected = others // ranks + keys_and_values // min(ranks, 2)
        assert layer_weights(ranks) == expected
    assert [ranks for ranks in range(1, 10) if cuts_evenly(weights.spec, ranks)] == [1, 2, 4, 8]


def test_175_billion_parameters_take_350_gb_in_16_bits() -> None:
    weights = ConfigWeights(OPT_175B)
    plan, _ = plan_storage(weights, ExecutorOptions())
    (stage,) = CutModel(weights.spec, plan, 1).stages(1)
    assert stage.weight_bytes == pytest.approx(350e9, rel=0.005)
    slices = CutModel(weights.spec, plan, 8).stages(4)
    assert max(one.weight_bytes for one in slices) == pytest.approx(350e9 / 32, rel=0.03)
