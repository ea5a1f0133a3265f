"""The grids of ggml's block types, taken over without loss where our formats can hold them.

Block layouts follow ggml's ``ggml-common.h``: Q4_0 is ``{f16 d; u8 qs[16]}``, Q4_1
``{f16 d; f16 m; u8 qs[16]}``, Q8_0 ``{f16 d; i8 qs[32]}``; element ``j`` of a 4-bit block is in the
low nibble of ``qs[j]``, element ``j + 16`` in the high one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fuserve.kernels.linear import Codes, Storage, WeightFormat

BLOCK = 32

GGML_GRIDS: Mapping[str, Storage] = MappingProxyType(
    {
        "Q4_0": Storage(WeightFormat.Q4, BLOCK),
        "Q4_1": Storage(WeightFormat.Q4_ASYMMETRIC, BLOCK),
        "Q8_0": Storage(WeightFormat.Q8, BLOCK),
    }
)
"""Types whose grid is one of ours."""

REGRIDDED: Mapping[str, Storage] = MappingProxyType(
    {
        "Q4_K": Storage(WeightFormat.Q4_ASYMMETRIC, BLOCK),
        "Q5_0": Storage(WeightFormat.Q8, BLOCK),
        "Q5_1": Storage(WeightFormat.Q8, BLOCK),
        "Q5_K": Storage(WeightFormat.Q8, BLOCK),
        "Q6_K": Storage(WeightFormat.Q8, BLOCK),
    }
)
"""Types that are rounded to the nearest point of a grid of ours at least as fine."""


def describe_dtype(dtype: str) -> str:
    """How weights stored as ``dtype`` are held in memory when nothing else is asked for."""
    if dtype in REGRIDDED:
        return f"{dtype}, regridded to {REGRIDDED[dtype].describe()}"
    if dtype in GGML_GRIDS:
        return f"{dtype}, kept as {GGML_GRIDS[dtype].describe()}"
    return dtype


def codes_of(dtype: str, blocks: npt.NDArray[np.uint8]) -> Codes:
    """Codes, scales and minimums of rows stored as ``dtype``, one of :data:`GGML_GRIDS`.

    Args:
        dtype: the ggml type.
        blocks: rows as stored.  # [rows, bytes_per_row]
    """
    rows = blocks.shape[0]
    head = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}[dtype]
    width = head + (BLOCK if dtype == "Q8_0" else BLOCK // 2)
    split = np.ascontiguousarray(blocks).reshape(rows, -1, width)  # [rows, groups, bytes]
    halves = np.ascontiguousarray(split[:, :, :head]).view(np.float16).astype(np.float32)
    body = split[:, :, head:]
    if dtype == "Q8_0":
        codes = np.ascontiguousarray(body)
    else:
        codes = np.concatenate([body & 15, body >> 4], axis=2)
    minimums = np.ascontiguousarray(halves[:, :, 1]) if dtype == "Q4_1" else None
    scales = np.ascontiguousarray(halves[:, :, 0])
    return Codes(codes.reshape(rows, -1), scales, minimums)
