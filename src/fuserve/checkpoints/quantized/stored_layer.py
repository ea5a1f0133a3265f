"""What a reader of a quantized format gives for each linear layer, and the checks they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.dequantize import to_float32
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear, QuantScheme, take_columns
from fuserve.quantization.scheme import GROUP_SIZES

Floats = npt.NDArray[np.float32]
Number = TypeVar("Number", np.float32, np.uint8)

FLOATS = ("F32", "F16", "BF16")
"""Types that scales are stored in."""

ROW_UNIT = 8
"""Output features that share a word at most."""

COLUMN_UNIT = max(GROUP_SIZES)
"""Input features that reading begins at a multiple of, so that cuts fall as in the whole layer."""

Span = tuple[int, int]

REGRIDDED = QuantScheme(8, 32)
"""What layers become whose groups are not runs of neighbouring features."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One quantized linear layer of a checkpoint, checked but not read.

    Attributes:
        parts: the stored tensors that it is made of.
        scheme: how it computes.
        shape: ``[out_features, in_features]``.
        read: reads some output and input features of the parts, and touches no others. What it is
            asked for begins with whole words and groups.
        group_size: input features of a stored group; a piece does not cut it.
        vectors: which of its vectors, by ``QuantizedLinear``'s names, the layer has.
    """

    parts: tuple[str, ...]
    scheme: QuantScheme
    shape: tuple[int, int]
    read: Callable[[slice, slice], QuantizedLinear]
    group_size: int = COLUMN_UNIT
    vectors: frozenset[str] = frozenset()

    def piece(self, rows: Span | None, cols: Span | None) -> QuantizedLinear:
        """Some output and input features, first and stop of each; None is all of them.

        ``output_shift`` stays that of all input features.
        """
        taken_rows = _widened(rows, ROW_UNIT, self.shape[0])
        taken_cols = _widened(cols, math.lcm(self.group_size, COLUMN_UNIT), self.shape[1])
        layer = self.read(taken_rows, taken_cols)
        if rows is not None:
            layer = layer.take(slice(rows[0] - taken_rows.start, rows[1] - taken_rows.start))
        if cols is not None:
            layer = take_columns(layer, cols[0] - taken_cols.start, cols[1] - taken_cols.start)
        return layer


def _widened(span: Span | None, unit: int, size: int) -> slice:
    """Whole units around the features of a span."""
    first, stop = span or (0, size)
    return slice(first // unit * unit, min(-(-stop // unit) * unit, size))


def require(folder: StoredTensors, name: str, dtypes: Sequence[str], shape: Sequence[int]) -> None:
    """Raise CheckpointError unless tensor ``name`` is there, of one of the types and the shape."""
    if name not in folder:
        refuse(folder, name, f"is missing, expected {' or '.join(dtypes)} of {list(shape)}.")
    stored, dtype = tuple(folder.shape(name)), folder.dtype(name)
    if dtype not in dtypes or stored != tuple(shape):
        refuse(
            folder,
            name,
            f"has shape {list(stored)} and type {dtype}, expected {' or '.join(dtypes)} of "
            f"{list(shape)}.",
        )


def refuse(folder: StoredTensors, name: str, message: str) -> NoReturn:
    """Raise CheckpointError for a part of a quantized layer."""
    raise CheckpointError(
        message,
        file=folder.path,
        tensor=name,
        remedy="It does not fit the config's quantization_config; fetch or quantize the model "
        "again.",
    )


def scheme_or_refuse(folder: StoredTensors, module: str, **fields: object) -> QuantScheme:
    """The scheme of a layer.

    Raises:
        UnsupportedModelError: there is no arithmetic for it, naming the layer.
    """
    try:
        return QuantScheme(**fields)  # type: ignore[arg-type]
    except InvalidRequestError as error:
        raise UnsupportedModelError(
            f"{folder.path}: layer {module!r} cannot be computed as it is quantized: {error}."
        ) from error


@dataclass(frozen=True, slots=True)
class Grouping:
    """Stored groups, and groups of ours that divide them, so that the values are the same.

    Attributes:
        num_stored: scales of a row as stored.
        group_size: features that share a scale here, 0: all of a row.
        repeat: how many groups here each stored scale is for.
        num_groups: scales of a row here.
    """

    num_stored: int
    group_size: int
    repeat: int
    num_groups: int

    @property
    def stored_size(self) -> int:
        """Features of a stored group; 1 where all of a row share one, which every piece has."""
        return self.repeat * self.group_size if self.num_stored > 1 else 1

    def of(self, cols: slice) -> tuple[Grouping, slice]:
        """The groups of some features, and which stored ones they are."""
        if self.num_stored == 1:
            num_groups = -(-(cols.stop - cols.start) // self.group_size) if self.group_size else 1
            return replace(self, repeat=num_groups, num_groups=num_groups), slice(0, 1)
        stored = slice(cols.start // self.stored_size, -(-cols.stop // self.stored_size))
        num_groups = -(-(cols.stop - cols.start) // self.group_size)
        num_stored = stored.stop - stored.start
        return replace(self, num_stored=num_stored, num_groups=num_groups), stored

    def spread(self, per_group: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """Scales or zero points for our groups  # [out, stored] -> [out, groups]"""
        if self.repeat == 1:
            return np.ascontiguousarray(per_group)
        return np.repeat(per_group, self.repeat, axis=1)[:, : self.num_groups]


def grouping(folder: StoredTensors, module: str, group_size: int, cols: int) -> Grouping:
    """How the groups of a layer are computed; ``group_size`` at most 0 is a scale per channel.

    Raises:
        UnsupportedModelError: groups that are no multiple of 32 features.
    """
    if not 0 < group_size < cols:
        return Grouping(1, 0, 1, 1)
    stored = group_size
    num_stored = -(-cols // stored)
    ours = next((size for size in reversed(GROUP_SIZES) if stored % size == 0), None)
    if ours is None:
        raise UnsupportedModelError(
            f"{folder.path}: layer {module!r} has groups of {group_size}; fuserve computes groups "
            "of a multiple of 32."
        )
    return Grouping(num_stored, ours, stored // ours, -(-cols // ours))


def irregular_groups(
    folder: StoredTensors, name: str, num_groups: int, group_size: int
) -> npt.NDArray[np.intp] | None:
    """The group of each feature, or None if groups are runs of neighbours as usual.

    Raises:
        CheckpointError: a group that there is not.
    """
    order = np.asarray(folder.tensor(name).data).astype(np.intp)
    if order.size and not 0 <= order.min() <= order.max() < num_groups:
        refuse(folder, name, f"names groups from {order.min()} to {order.max()}, of {num_groups}.")
    runs = np.arange(order.size) // group_size if group_size > 0 else np.zeros_like(order)
    return None if np.array_equal(order, runs) else order


def floats(folder: StoredTensors, name: str, *place: slice) -> Floats:
    """A tensor's values, or those at a place in it, refused if they are not finite."""
    tensor = folder.tensor(name)
    part = tensor.data[place]
    values = np.ascontiguousarray(to_float32(replace(tensor, shape=part.shape, data=part)))
    if not np.isfinite(values).all():
        refuse(folder, name, "holds values that are not finite.")
    return values


def from_zero_points(
    codes: npt.NDArray[np.uint8], scales: Floats, zeros: npt.NDArray[np.uint8] | None, bits: int
) -> Codes:
    """Unsigned codes with zero points, ``scale * (code - zero)``, in the kernels' conventions.

    ``zeros`` None is the middle of the range, of symmetric schemes.  # [out, groups]
    """
    if zeros is not None:
        return Codes(codes, scales, -scales * zeros.astype(np.float32))
    return Codes(codes ^ np.uint8(128), scales) if bits == 8 else Codes(codes, scales)
