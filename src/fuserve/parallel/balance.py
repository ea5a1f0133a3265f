"""Where to cut a model's layers into stages so that the heaviest stage is as light as can be."""

from __future__ import annotations

from collections.abc import Sequence

from fuserve.errors import InvalidRequestError

_HALVINGS = 52  # to the last bit of what is searched


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
    low, high = max(layer_costs), sum(layer_costs)
    stages = _filled(layer_costs, num_stages, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        lighter = _filled(layer_costs, num_stages, middle)
        if lighter is None:
            low = middle
        else:
            stages, high = lighter, middle
    assert stages is not None, "one stage's worth of room holds everything"
    return stages


def _filled(layer_costs: Sequence[float], num_stages: int, most: float) -> tuple[range, ...] | None:
    """Stages that are filled up to ``most`` in turn; None if the last one overflows."""
    stages = []
    start = 0
    for later in reversed(range(num_stages)):
        cost, stop = layer_costs[start], start + 1
        while stop < len(layer_costs) - later and cost + layer_costs[stop] <= most:
            cost += layer_costs[stop]
            stop += 1
        if cost > most:
            return None
        stages.append(range(start, stop))
        start = stop
    return tuple(stages) if start == len(layer_costs) else None
