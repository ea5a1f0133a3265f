"""From a model argument to an executor: the one place where memory is planned."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fuserve.architectures import DecoderSpec, num_parameters
from fuserve.checkpoints import Checkpoint, open_checkpoint
from fuserve.decoder.model_part import ModelPart
from fuserve.decoder.native import CACHE_TYPES, NativeExecutor, cache_type, kv_block_bytes
from fuserve.decoder.options import ExecutorOptions, KVCacheDtype
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
        close = getattr(self.executor, "close", None)
        if close is not None:
            close()


def load_model(
    model: str,
    options: ExecutorOptions,
    progress: Progress | None = None,
    *,
    memory_share: float = 1.0,
    reserved_bytes: int = 0,
) -> LoadedModel:
    """Load a model for generation.

    Args:
        model: folder, ``.gguf`` file, hub id or ``demo``; with ``load_format="dummy"`` a
            ``config.json`` or a folder that has one.
        options: formats, sizes, threads.
        progress: called with what is done, how many of how many.
        memory_share: part of the free memory to plan with, where several models start at once.
        reserved_bytes: of the free memory, kept for what is loaded later.

    Raises:
        ModelNotFoundError: nothing is there under that name.
        CheckpointError: the checkpoint is damaged or incomplete.
        UnsupportedModelError: the architecture is not supported.
        CapacityError: weights and cache do not fit into memory.
        InvalidRequestError: the options contradict each other.
    """
    start = time.perf_counter()
    checkpoint, weights = open_weights(model, options)
    available_bytes = unreserved_memory(reserved_bytes, memory_share)
    if options.executor == "reference":
        return _load_reference(weights, checkpoint, options, start, available_bytes)
    return _load_native(weights, checkpoint, options, progress, start, available_bytes)


def unreserved_memory(reserved_bytes: int, share: float = 1.0) -> int:
    """Bytes of a share of the free memory beside what is kept for others.

    Raises:
        CapacityError: there is not even as much.
    """
    available_bytes = int(share * available_memory())
    if available_bytes < reserved_bytes:
        raise CapacityError(
            f"{reserved_bytes / 1e9:.2f} GB are to be kept for the image model, but only "
            f"{available_bytes / 1e9:.2f} GB of memory are free"
        )
    return available_bytes - reserved_bytes


def open_weights(model: str, options: ExecutorOptions) -> tuple[Checkpoint | None, DecoderWeights]:
    """A model's checkpoint, None for dummy weights, and its weights, which are not read yet.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as ``load_model``.
    """
    if options.load_format == "dummy":
        return None, DummyWeights(spec_from_config(read_config(Path(model))))
    checkpoint = open_checkpoint(model)
    return checkpoint, CheckpointWeights(checkpoint)


def model_cache_dtype(weights: DecoderWeights, options: ExecutorOptions) -> KVCacheDtype:
    """The type of a model's KV cache, decided where it is "auto"."""
    plan, _ = plan_storage(weights, options, ModelPart(weights.spec))
    kind = cache_type(options, plan)
    return next(name for name in get_args(KVCacheDtype) if CACHE_TYPES.get(name) is kind)


def _load_native(
    weights: DecoderWeights,
    checkpoint: Checkpoint | None,
    options: ExecutorOptions,
    progress: Progress | None,
    start: float,
    available_bytes: int,
) -> LoadedModel:
    spec = weights.spec
    num_blocks, max_model_len = plan_cache(
        spec, options, *part_bytes(weights, options), available_bytes
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
    available_bytes: int,
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
        spec, options, parameter_bytes, block_bytes, available_bytes
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
    available_bytes: int | None = None,
) -> tuple[int, int]:
    """Blocks of the KV cache, and the longest sequence that they and the model allow.

    Args:
        spec: of the model.
        options: sizes that the user has chosen.
        weight_bytes: of all weights on this host.
        block_bytes: of one block in all layers on this host.
        available_bytes: memory that can be taken; None asks the system.

    Raises:
        CapacityError: the weights, or one sequence beside them, do not fit into memory.
        InvalidRequestError: max_model_len is beyond the model's positions.
    """
    longest = options.max_model_len or spec.max_position
    if longest > spec.max_position:
        raise InvalidRequestError(
            f"max_model_len {longest} is beyond the {spec.max_position} positions of the model"
        )
    if available_bytes is None:
        available_bytes = available_memory()
    room = available_bytes - weight_bytes
    if room <= 0:
        raise CapacityError(
            f"the weights need {weight_bytes / 1e9:.2f} GB, but only "
            f"{available_bytes / 1e9:.2f} GB of memory are free; choose int8 or int4 "
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
