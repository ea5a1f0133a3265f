"""What a user may choose about the ranks that run a model together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fuserve.errors import InvalidRequestError

Balance = Literal["bytes", "measured"]


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """How many ranks, and how long they may take.

    Attributes:
        tensor_parallel_size: ranks that have a slice of each layer of a stage.
        pipeline_parallel_size: stages, each of some consecutive layers.
        balance: cut the stages so that each has as many "bytes" of weights, or takes as much time
            as "measured" on this host.
        step_timeout_s: a step that takes longer has a rank that hangs.
        join_timeout_s: a rank that says nothing for so long while the group starts has failed.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    balance: Balance = "bytes"
    step_timeout_s: float = 60.0
    join_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("step_timeout_s", "join_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
