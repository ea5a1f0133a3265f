"""Loading a rank's part of a model, and what is decided for all ranks before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache as all ranks have it, each for its own layers and heads.

    Attributes:
        num_blocks: of each rank's cache.
        max_model_len: tokens of the longest sequence.
    """

    num_blocks: int
    max_model_len: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a rank holds; see ``LoadReport``."""

    packed_bytes: int
    bytes_read_per_token: int
    from_cache: bool
    num_threads: int
    kv_cache_bytes: int
    load_s: float
    formats: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardReport:
        """From plain values."""
        return cls(**values)
