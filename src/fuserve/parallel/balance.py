"""Where to cut a model's layers into stages so that the heaviest stage is as light as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from fuserve.errors import InvalidRequestError


def balanced_stages(layer_costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Consecutive layers for each stage, at least one.

    Args:
        layer_costs: of each layer, in any unit; the first with the embedding, the last with the
            head.
        num_stages: stages to make.

    Raises:
        InvalidRequestError: there are more stages than layers.
    """
    num_layers = len(layer_costs)
    if num_stages > num_layers:
        raise InvalidRequestError(
            f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers"
        )
    before = [0.0, *accumulate(layer_costs)]

    @cache
    def best(end: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The heaviest stage, and where stages begin, of layers up to ``end``."""
        if stages == 1:
            return before[end], (0,)
        options = []
        for start in range(stages - 1, end):
            heaviest, starts = best(start, stages - 1)
            options.append((max(heaviest, before[end] - before[start]), (*starts, start)))
        return min(options)

    _, starts = best(num_layers, num_stages)
    ends = (*starts[1:], num_layers)
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))
