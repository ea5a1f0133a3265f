"""Stored tensors as fp32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.tensor import BLOCK_SIZES, Tensor
from fuserve.errors import UnsupportedModelError


def to_float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The tensor's values, of ``tensor.shape``; F32 stays a view of the file where it can.

    Raises:
        UnsupportedModelError: the stored type holds no plain floating-point values.
    """
    if tensor.dtype in ("F32", "F16", "F64"):
        return tensor.data.astype(np.float32, copy=False)
    if tensor.dtype == "BF16":
        bits = tensor.data.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if tensor.dtype in BLOCK_SIZES:
        return _from_blocks(tensor)
    if tensor.quantized is not None:
        return tensor.quantized.values()
    raise UnsupportedModelError(
        f"tensor {tensor.name!r} has the type {tensor.dtype}, which cannot be read as float32. "
        "Use a checkpoint in F32, F16, BF16 or a GGUF block type."
    )


def _from_blocks(tensor: Tensor) -> npt.NDArray[np.float32]:
    # gguf takes a tenth of a second to import, so only when a block type is met.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(tensor.data, GGMLQuantizationType[tensor.dtype])
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)
