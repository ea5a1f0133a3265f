"""Loading a rank's part of a model, and what is decided for all ranks before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fuserve.checkpoints import Checkpoint
from fuserve.decoder.communicator import Communicator
from fuserve.decoder.load import cache_file, part_bytes, plan_cache
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.packing import Progress
from fuserve.decoder.shard import WHOLE_MODEL, Shard
from fuserve.decoder.weights import DecoderWeights
from fuserve.parallel.layout import GroupLayout


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
    isa: str
    kv_cache_bytes: int
    formats: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardReport:
        """From plain values."""
        return cls(**values)

    @classmethod
    def of(cls, executor: NativeExecutor) -> ShardReport:
        """What an executor holds."""
        return cls(
            packed_bytes=executor.packed_bytes,
            bytes_read_per_token=executor.bytes_read_per_token,
            from_cache=executor.from_cache,
            num_threads=executor.num_threads,
            isa=executor.isa,
            kv_cache_bytes=executor.kv_cache_bytes,
            formats=executor.formats,
        )


def load_shard(
    checkpoint: Checkpoint | None,
    weights: DecoderWeights,
    options: ExecutorOptions,
    shard: Shard,
    plan: CachePlan,
    communicator: Communicator | None,
    progress: Progress | None = None,
) -> NativeExecutor:
    """The executor of a part. Of the checkpoint, only the part is read.

    Raises:
        CheckpointError, CapacityError, InvalidRequestError: as ``load_model``.
    """
    return NativeExecutor(
        weights,
        options,
        num_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
        cache_file=cache_file(checkpoint, options, shard),
        progress=progress,
        shard=shard,
        communicator=communicator,
    )


def plan_ranks(
    weights: DecoderWeights,
    options: ExecutorOptions,
    layout: GroupLayout,
    ranks: Sequence[int],
    available_bytes: int | None = None,
) -> CachePlan:
    """The KV cache that the ranks of one host can have together.

    A size that the user has given is that of all ranks of the group.

    Args:
        weights: of the model.
        options: of all ranks.
        layout: of the group.
        ranks: those of the host.
        available_bytes: of the host's memory; None asks this host.

    Raises:
        CapacityError: their parts and one sequence do not fit.
    """
    sizes = [part_bytes(weights, options, layout.shard(rank)) for rank in ranks]
    weight_bytes, block_bytes = (sum(part) for part in zip(*sizes, strict=True))
    if options.kv_cache_bytes is not None:
        _, whole_block_bytes = part_bytes(weights, options, WHOLE_MODEL)
        share = block_bytes / whole_block_bytes
        options = replace(options, kv_cache_bytes=int(options.kv_cache_bytes * share))
    return CachePlan(*plan_cache(weights.spec, options, weight_bytes, block_bytes, available_bytes))
