"""What each layer of a model costs, by which the stages of a pipeline are balanced."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from fuserve.decoder.load import part_bytes
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import Shard
from fuserve.decoder.step import StepBatch
from fuserve.decoder.weights import DecoderWeights
from fuserve.parallel.shard_loading import CachePlan, load_shard

_NUM_ROWS = 8
"""Sequences that decode in the measured step."""
_NUM_STEPS = 20


def layer_bytes(weights: DecoderWeights, options: ExecutorOptions) -> list[float]:
    """Bytes of weights of each layer; the first has the embedding, the last the head."""
    return [
        part_bytes(weights, options, Shard(first_layer=layer, end_layer=layer + 1))[0]
        for layer in range(weights.spec.num_layers)
    ]


def layer_seconds(weights: DecoderWeights, options: ExecutorOptions) -> list[float]:
    """Seconds of each layer in a step of a few decoding sequences, measured on this host.

    The first layer is measured, embedding included, and the last with the head; those between take
    as long as the first for each byte.
    """
    num_layers = weights.spec.num_layers
    num_bytes = layer_bytes(weights, options)
    if num_layers < 3:
        return num_bytes
    plan = CachePlan(num_blocks=_NUM_ROWS, max_model_len=weights.spec.max_position)
    first = _step_seconds(weights, options, Shard(end_layer=1), plan)
    inner = _step_seconds(weights, options, Shard(first_layer=1, end_layer=2), plan)
    last = _step_seconds(weights, options, Shard(first_layer=num_layers - 1), plan)
    between = [inner * size / num_bytes[1] for size in num_bytes[1:-1]]
    return [first, *between, last]


def _step_seconds(
    weights: DecoderWeights, options: ExecutorOptions, shard: Shard, plan: CachePlan
) -> float:
    # Without the checkpoint the packed weights are not kept: this part is never loaded again.
    executor = load_shard(None, weights, options, shard, plan, None)
    rows = np.arange(_NUM_ROWS, dtype=np.int32)
    batch = StepBatch(
        tokens=rows,
        positions=np.zeros(_NUM_ROWS, np.int32),
        query_starts=np.arange(_NUM_ROWS + 1, dtype=np.int32),
        block_tables=rows[:, None],
        logit_rows=rows if shard.is_last_stage(weights.spec) else rows[:0],
    )
    hidden = None
    if not shard.is_first_stage:
        hidden = np.ones((_NUM_ROWS, weights.spec.hidden_size), np.float32)
    seconds = []
    for _ in range(_NUM_STEPS):
        start_s = time.perf_counter()
        executor.step(batch, hidden)
        seconds.append(time.perf_counter() - start_s)
    executor.close()
    return median(seconds)
