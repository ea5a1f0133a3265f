"""A model is cut into stages and slices that are as even as they can be."""

from __future__ import annotations

import pytest

from fuserve.architectures import tensor_shapes
from fuserve.decoder.load import part_bytes
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import Shard
from fuserve.planning.layout import CutModel, cuts_evenly
from fuserve.planning.model import ConfigWeights
from tests.planning.shapes import LLAMA, OPT_175B

OPTIONS = [
    ExecutorOptions(),
    ExecutorOptions(quantization="int8"),
    ExecutorOptions(quantization="int4", quantize_embeddings=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options.quantization))
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 3])
def test_a_stage_has_the_bytes_that_its_fullest_rank_packs(
    options: ExecutorOptions, tensor: int, pipeline: int
) -> None:
    weights = ConfigWeights(LLAMA)
    start = 0
    for stage in CutModel(weights, options, tensor).stages(pipeline):
        end = start + stage.num_layers
        shards = [Shard(rank, tensor, start, end) for rank in range(tensor)]
        packed = max(part_bytes(weights, options, shard)[0] for shard in shards)
        padding = 64 * len(tensor_shapes(weights.spec))
        assert packed - padding <= stage.weight_bytes <= packed
        start = end


def test_few_kv_heads_are_held_by_several_ranks() -> None:
    weights = ConfigWeights(LLAMA)  # 8 heads, 2 KV heads
    others, keys_and_values = 6 * (2 * 256 * 256 + 3 * 512 * 256), 6 * 2 * 64 * 256
    for ranks in (1, 2, 4):
        (stage,) = CutModel(weights, ExecutorOptions(), ranks).stages(1)
        (products,) = stage.layers
        assert products.num_weights == others // ranks + keys_and_values // min(ranks, 2)
        assert stage.num_kv_heads == 2 // min(ranks, 2)
    assert [ranks for ranks in range(1, 10) if cuts_evenly(weights.spec, ranks)] == [1, 2, 4]


def test_175_billion_parameters_take_350_gb_in_16_bits() -> None:
    weights = ConfigWeights(OPT_175B)
    assert CutModel(weights, ExecutorOptions(), 1).weight_bytes == pytest.approx(350e9, rel=0.005)
    slices = CutModel(weights, ExecutorOptions(), 8).stages(4)
    assert max(one.weight_bytes for one in slices) == pytest.approx(350e9 / 32, rel=0.03)
