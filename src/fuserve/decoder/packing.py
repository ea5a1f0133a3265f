"""Packing a model's tensors, one at a time, into the memory that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fuserve._native import ThreadPool
from fuserve.checkpoints import Tensor, to_float32
from fuserve.decoder.packed_file import Memory, PackedFile, packed_bytes
from fuserve.decoder.storage_plan import PLAIN, VECTORS, PlannedTensor, place_of
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import CheckpointError
from fuserve.kernels.linear import pack_codes, pack_floats
from fuserve.quantization import GGML_GRIDS, codes_of

Progress = Callable[[str, int, int], None]


def packed_memory(
    weights: DecoderWeights,
    plan: Mapping[str, PlannedTensor],
    pool: ThreadPool,
    cache_file: Path | None,
    progress: Progress | None,
) -> tuple[Memory, bool]:
    """The packed tensors of a plan, and whether they came from the cache file.

    Unpacked tensors are let go one by one, so that memory stays near the packed size.
    """
    file = PackedFile(cache_file, plan) if cache_file is not None else None
    if file is not None and (memory := file.open()) is not None:
        return memory, True
    memory = file.create() if file is not None else None
    is_on_disk = memory is not None
    if memory is None:
        memory = np.empty(packed_bytes(plan), np.uint8)
    try:
        for done, tensor in enumerate(plan.values()):
            if tensor.vector_of is None:
                source = weights.tensor(tensor.source, tensor.rows, tensor.cols)
                _pack(source, tensor, _slot(memory, tensor), pool)
                _pack_vectors(source, tensor, plan, memory)
                weights.release(tensor.source)
            if progress is not None:
                progress("packing weights", done + 1, len(plan))
    except BaseException:
        if file is not None:
            file.discard()
        raise
    if file is not None and is_on_disk:
        file.commit()
    return memory, False


def _slot(memory: Memory, tensor: PlannedTensor) -> Memory:
    return memory[tensor.offset : tensor.offset + tensor.num_bytes]


def _pack_vectors(
    source: Tensor, target: PlannedTensor, plan: Mapping[str, PlannedTensor], memory: Memory
) -> None:
    """What belongs to a quantized linear beside its weights.

    Raises:
        CheckpointError: another linear of the same input has another vector.
    """
    for field in VECTORS:
        planned = place_of(target.name, field, plan)
        values = getattr(source.quantized, field, None)
        if planned is None or values is None:
            continue
        slot = _slot(memory, planned).view(np.float32)
        if planned.vector_of == target.name:
            slot[:] = values
        elif not np.array_equal(slot, np.float32(np.atleast_1d(values))):
            raise CheckpointError(
                f"has another {field} than {planned.vector_of}, which reads the same input.",
                tensor=target.name,
                remedy="Their input is quantized once; calibrate such layers together.",
            )


def _pack(source: Tensor, target: PlannedTensor, slot: Memory, pool: ThreadPool) -> None:
    if target.storage is None:
        slot.view(np.float32)[:] = to_float32(source).reshape(-1)
        return
    rows, cols = target.shape
    shape = target.storage.shape(rows, cols, target.row_group)
    layer = source.quantized
    if layer is not None and layer.scheme.keeps_codes and layer.scheme.storage == target.storage:
        pack_codes(shape, layer.codes, slot, pool)
    elif GGML_GRIDS.get(source.dtype) == target.storage:
        data = np.asarray(source.data, np.uint8)
        pack_codes(shape, codes_of(source.dtype, data), slot, pool)
    elif source.dtype in PLAIN:
        pack_floats(shape, source.data, slot, pool, bfloat=source.dtype == "BF16")
    else:
        pack_floats(shape, to_float32(source), slot, pool)
