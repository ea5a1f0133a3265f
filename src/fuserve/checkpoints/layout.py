"""Where tensors lie in a file, and the checks that every format shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.mapped_file import FETCH_AGAIN, MappedFile
from fuserve.checkpoints.tensor import BLOCK_SIZES, Tensor
from fuserve.errors import CheckpointError

NUMPY_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
}
"""How an element of each plain stored type is seen by numpy; BF16 and F8 as raw bits."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor's place: bytes ``start:stop`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, file: MappedFile) -> Tensor:
        """The tensor as a view of the map; a copy only where the file misaligns its elements."""
        raw = file.view(self.start, self.stop)
        if self.dtype in BLOCK_SIZES:
            elements, block_bytes = BLOCK_SIZES[self.dtype]
            row_bytes = self.shape[-1] // elements * block_bytes
            blocks = raw.reshape(*self.shape[:-1], row_bytes)
            return Tensor(self.name, self.dtype, self.shape, blocks)
        dtype = np.dtype(NUMPY_DTYPES[self.dtype])
        data: npt.NDArray[np.generic] = raw.view(dtype).reshape(self.shape)
        if not data.flags.aligned:
            data = data.copy()
        return Tensor(self.name, self.dtype, self.shape, data)


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; a block type's last dimension must be a whole number of blocks."""
    count = math.prod(shape)
    if dtype in BLOCK_SIZES:
        elements, block_bytes = BLOCK_SIZES[dtype]
        return count // elements * block_bytes
    return count * np.dtype(NUMPY_DTYPES[dtype]).itemsize


def check_within_file(layouts: Collection[TensorLayout], file: MappedFile) -> None:
    """Raise CheckpointError if a tensor ends beyond the file or overlaps another."""
    previous: TensorLayout | None = None
    for layout in sorted(layouts, key=lambda one: (one.start, one.stop)):
        if layout.stop > file.size:
            raise CheckpointError(
                f"its data ends at byte {layout.stop}, but the file has only {file.size}.",
                file=file.path,
                tensor=layout.name,
                remedy=FETCH_AGAIN,
            )
        if previous is not None and layout.start < previous.stop:
            raise CheckpointError(
                f"its data overlaps that of tensor {previous.name!r}.",
                file=file.path,
                tensor=layout.name,
                remedy="The header is damaged: fetch or convert the file again.",
            )
        if layout.stop > layout.start:
            previous = layout


def missing_tensor(name: str, known: Iterable[str], path: Path) -> CheckpointError:
    """The error for a name that the checkpoint does not have, with the nearest names it has."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"Similar names: {', '.join(near)}." if near else "No tensor has a similar name."
    return CheckpointError("is not in the checkpoint.", file=path, tensor=name, remedy=hint)
