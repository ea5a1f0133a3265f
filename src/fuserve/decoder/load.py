"""From a model argument to an executor: the one place where memory is planned."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fuserve.architectures import DecoderSpec, num_parameters
from fuserve.checkpoints import Checkpoint, open_checkpoint
from fuserve.decoder.model_part import ModelPart
from fuserve.decoder.native import NativeExecutor, cache_type, kv_block_bytes
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.packed_file import cache_folder, packed_bytes
from fuserve.decoder.packing import Progress
from fuserve.decoder.shard import WHOLE_MODEL, Shard
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor
from fuserve.decoder.storage_plan import plan_storage
from fuserve.decoder.weights import (
    CheckpointWeights,
    DecoderWeights,
    DummyWeights,
    spec_from_config,
)
from fuserve.errors import CapacityError, InvalidRequestError, ModelNotFoundError
from fuserve.kernels.cache import CacheType
from fuserve.kernels.memory import available_memory

CACHE_SHARE = 0.5
"""Part of the memory left beside the weights that a KV cache may take unless its size is given."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a model did and took.

    ``formats`` tells how each linear weight is held; ``isa`` is "torch" for the reference executor.
    """

    load_s: float
    packed_bytes: int
    bytes_read_per_token: int
    from_cache: bool
    num_threads: int
    isa: str
    kv_cache_bytes: int
    formats: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An executor with what it was made from; ``checkpoint`` is None for dummy weights."""

    executor: Executor
    spec: DecoderSpec
    checkpoint: Checkpoint | None
    max_model_len: int
    report: LoadReport

    def close(self) -> None:
        """Let go of weights, cache and threads."""
        if isinstance(self.executor, NativeExecutor):
            self.executor.close()


def load_model(
    model: str,
    options: ExecutorOptions,
    progress: Progress | None = None,
    *,
    memory_share: float = 1.0,
) -> LoadedModel:
    """Load a model for generation.

    Args:
        model: folder, ``.gguf`` file, hub id or ``demo``; with ``load_format="dummy"`` a
            ``config.json`` or a folder that has one.
        options: formats, sizes, threads.
        progress: called with what is done, how many of how many.
        memory_share: part of the free memory to plan with, where several models start at once.

    Raises:
        ModelNotFoundError: nothing is there under that name.
        CheckpointError: the checkpoint is damaged or incomplete.
        UnsupportedModelError: the architecture is not supported.
        CapacityError: weights and cache do not fit into memory.
        InvalidRequestError: the options contradict each other.
    """
    start = time.perf_counter()
    checkpoint = None if options.load_format == "dummy" else open_checkpoint(model)
    weights: DecoderWeights = (
        CheckpointWeights(checkpoint)
        if checkpoint is not None
        else DummyWeights(spec_from_config(read_config(Path(model))))
    )
    if options.executor == "reference":
        return _load_reference(weights, checkpoint, options, start, memory_share)
    return _load_native(weights, checkpoint, options, progress, start, memory_share)


def _load_native(
    weights: DecoderWeights,
    checkpoint: Checkpoint | None,
    options: ExecutorOptions,
    progress: Progress | None,
    start: float,
    memory_share: float,
) -> LoadedModel:
    spec = weights.spec
    num_blocks, max_model_len = plan_cache(
        spec, options, *part_bytes(weights, options), memory_share
    )
    executor = NativeExecutor(
        weights,
        options,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        cache_file=cache_file(checkpoint, options),
        progress=progress,
    )
    report = LoadReport(
        load_s=time.perf_counter() - start,
        packed_bytes=executor.packed_bytes,
        bytes_read_per_token=executor.bytes_read_per_token,
        from_cache=executor.from_cache,
        num_threads=executor.num_threads,
        isa=executor.isa,
        kv_cache_bytes=executor.kv_cache_bytes,
        formats=executor.formats,
    )
    return LoadedModel(executor, spec, checkpoint, max_model_len, report)


def _load_reference(
    weights: DecoderWeights,
    checkpoint: Checkpoint | None,
    options: ExecutorOptions,
    start: float,
    memory_share: float,
) -> LoadedModel:
    from fuserve.decoder.reference import ReferenceExecutor  # imports torch

    if options.quantization is not None:
        raise InvalidRequestError(
            "the reference executor computes in floating point: leave quantization out, "
            "or use executor='native'"
        )
    spec = weights.spec
    parameter_bytes = 4 * num_parameters(spec)
    block_bytes = kv_block_bytes(spec, CacheType.F32)
    num_blocks, max_model_len = plan_cache(
        spec, options, parameter_bytes, block_bytes, memory_share
    )
    executor = ReferenceExecutor(weights, num_blocks=num_blocks, device=options.device)
    report = LoadReport(
        load_s=time.perf_counter() - start,
        packed_bytes=parameter_bytes,
        bytes_read_per_token=parameter_bytes,
        from_cache=False,
        num_threads=1,
        isa="torch",
        kv_cache_bytes=num_blocks * block_bytes,
        formats={},
    )
    return LoadedModel(executor, spec, checkpoint, max_model_len, report)


def part_bytes(
    weights: DecoderWeights, options: ExecutorOptions, shard: Shard = WHOLE_MODEL
) -> tuple[int, int]:
    """Bytes of a part's packed weights, and of one block of its KV cache.

    Raises:
        InvalidRequestError: the options contradict each other, or the model cannot be divided so.
    """
    part = ModelPart(weights.spec, shard, options.rank_invariant)
    plan, _ = plan_storage(weights, options, part)
    return packed_bytes(plan), kv_block_bytes(part.spec, cache_type(options, plan))


def plan_cache(
    spec: DecoderSpec,
    options: ExecutorOptions,
    weight_bytes: int,
    block_bytes: int,
    memory_share: float = 1.0,
) -> tuple[int, int]:
    """Blocks of the KV cache, and the longest sequence that they and the model allow.

    Raises:
        CapacityError: the weights, or one sequence beside them, do not fit into memory.
        InvalidRequestError: max_model_len is beyond the model's positions.
    """
    longest = options.max_model_len or spec.max_position
    if longest > spec.max_position:
        raise InvalidRequestError(
            f"max_model_len {longest} is beyond the {spec.max_position} positions of the model"
        )
    room = int(memory_share * available_memory()) - weight_bytes
    if room <= 0:
        raise CapacityError(
            f"the weights need {weight_bytes / 1e9:.2f} GB, but only "
            f"{(room + weight_bytes) / 1e9:.2f} GB of memory are free; choose int8 or int4 "
            "quantization or a smaller model"
        )
    budget = options.kv_cache_bytes or int(CACHE_SHARE * room)
    affordable = budget // block_bytes
    per_sequence = -(-longest // BLOCK_SIZE_TOKENS)
    # A length that the user asked for must fit; the model's own may be cut to what memory allows.
    if affordable < (per_sequence if options.max_model_len is not None else 1):
        raise CapacityError(
            f"a sequence of {longest} tokens needs {per_sequence * block_bytes / 1e6:.1f} MB of KV "
            f"cache, but {budget / 1e6:.1f} MB are available; lower max_model_len or raise "
            "kv_cache_bytes"
        )
    num_blocks = affordable
    if options.kv_cache_bytes is None:
        num_blocks = min(affordable, options.max_num_seqs * per_sequence)
    return num_blocks, min(longest, num_blocks * BLOCK_SIZE_TOKENS)


def cache_file(
    checkpoint: Checkpoint | None, options: ExecutorOptions, shard: Shard = WHOLE_MODEL
) -> Path | None:
    """Where a part's packed weights are kept; None for dummy weights, which are not kept."""
    if checkpoint is None:
        return None
    choices = (
        options.dtype,
        options.quantization,
        options.group_size,
        options.symmetric,
        options.quantize_embeddings,
        options.quantize_layers,
        *((options.rank_invariant,) if options.rank_invariant else ()),
        *((shard,) if shard != WHOLE_MODEL else ()),
    )
    key = hashlib.sha256(f"{checkpoint.content_key()} {choices}".encode()).hexdigest()
    return cache_folder() / f"{key[:32]}.packed"


def read_config(path: Path) -> Mapping[str, object]:
    """A config.json, by itself or in its folder.

    Raises:
        ModelNotFoundError: it cannot be read, or is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ModelNotFoundError(
            f"{file}: cannot be read ({error.strerror}); dummy weights need a config.json"
        ) from error
    except ValueError as error:
        raise ModelNotFoundError(f"{file}: is not a JSON config ({error})") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{file}: is not a config: expected a JSON object")
    return config
