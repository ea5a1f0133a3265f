"""Reading and checking the header of a safetensors file before anything is allocated.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data, to which the
header's offsets are relative (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from fuserve.checkpoints.layout import (
    NUMPY_DTYPES,
    TensorLayout,
    check_within_file,
    stored_bytes,
)
from fuserve.checkpoints.mapped_file import FETCH_AGAIN, MappedFile
from fuserve.errors import CheckpointError, UnsupportedModelError

MAX_HEADER_BYTES = 32 << 20
"""A tensor takes about 120 bytes of header, so this is room for 250 000 tensors in one file."""

_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8


def read_safetensors_header(file: MappedFile) -> tuple[dict[str, TensorLayout], int]:
    """All tensors of the file in the order of the header, and the offset at which data starts.

    Raises:
        CheckpointError: the header does not describe this file.
        UnsupportedModelError: a tensor has a type that fuserve does not know.
    """
    data_start = _header_end(file)
    entries = _parse_header(file, data_start)
    layouts = {
        name: _layout(file, name, entry, data_start)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    check_within_file(layouts.values(), file)
    return layouts, data_start


def _header_end(file: MappedFile) -> int:
    if file.size < _LENGTH_BYTES:
        raise CheckpointError(
            f"has only {file.size} bytes, too few for a safetensors header.",
            file=file.path,
            remedy=FETCH_AGAIN,
        )
    length = int.from_bytes(file.map[:_LENGTH_BYTES], "little")
    if length > file.size - _LENGTH_BYTES:
        raise CheckpointError(
            f"its header claims {length} bytes, but the file has only {file.size}.",
            file=file.path,
            remedy=FETCH_AGAIN,
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"its header claims {length} bytes; more than {MAX_HEADER_BYTES} is refused.",
            file=file.path,
            remedy="This is not a safetensors file, or it is damaged: fetch it again.",
        )
    return _LENGTH_BYTES + length


def _parse_header(file: MappedFile, data_start: int) -> dict[str, Any]:
    text = file.map[_LENGTH_BYTES:data_start]
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its header is not valid JSON ({error}).", file=file.path, remedy=FETCH_AGAIN
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            "its header is not a JSON object.", file=file.path, remedy=FETCH_AGAIN
        )
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice, and readers differ in which they take; so refuse it."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _layout(file: MappedFile, name: str, entry: Any, data_start: int) -> TensorLayout:
    def refuse(message: str) -> CheckpointError:
        return CheckpointError(message, file=file.path, tensor=name, remedy=FETCH_AGAIN)

    if not isinstance(entry, dict):
        raise refuse("its header entry is not a JSON object.")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise refuse("its header entry has no dtype.")
    if not _is_shape(shape):
        raise refuse(f"its shape is {str(shape)[:80]}, not a short list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"its data_offsets are {str(offsets)[:80]}, not [begin, end].")
    if dtype not in NUMPY_DTYPES:
        raise UnsupportedModelError(
            f"{file.path}: tensor {name!r} has the type {dtype}, which fuserve cannot read. "
            f"Known types: {', '.join(NUMPY_DTYPES)}."
        )
    start, stop = offsets
    expected = stored_bytes(dtype, tuple(shape))
    if stop - start != expected:
        raise refuse(
            f"shape {shape} of {dtype} needs {expected} bytes, but the header gives it "
            f"{stop - start}."
        )
    return TensorLayout(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_shape(value: Any) -> bool:
    """Sizes that numpy can hold even where a zero among them makes the tensor empty."""
    return (
        _are_sizes(value)
        and len(value) <= _MAX_DIMENSIONS
        and math.prod(size or 1 for size in value) < 1 << 48
    )
