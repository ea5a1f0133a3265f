"""Reading and checking everything in a GGUF file before its tensor data.

A parser of our own, because ``gguf.GGUFReader`` makes a numpy array of every token and merge
(1.5 s for a vocabulary of 49 000) and trusts the counts it reads. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuserve.checkpoints.layout import TensorLayout, check_within_file, stored_bytes
from fuserve.checkpoints.mapped_file import FETCH_AGAIN, MappedFile
from fuserve.checkpoints.tensor import BLOCK_SIZES
from fuserve.errors import CheckpointError, UnsupportedModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_DTYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}

# No real file comes near these; a damaged count must not cost seconds or gigabytes.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_STRING_BYTES = 16 << 20
_MAX_ARRAY_ITEMS = 4 << 20  # of all arrays together
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensor places of one file; tensor data starts at ``data_start``."""

    metadata: dict[str, Any]
    layouts: dict[str, TensorLayout]
    data_start: int


def read_gguf_header(file: MappedFile) -> GgufHeader:
    """Parse and check the header.

    Raises:
        CheckpointError: the header does not describe this file.
        UnsupportedModelError: a version, a split file or a tensor type that fuserve cannot read.
    """
    cursor = _Cursor(file)
    try:
        tensor_count, key_count = _read_start(cursor)
        metadata = _read_metadata(cursor, key_count)
        infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    except UnicodeDecodeError as error:
        raise cursor.damaged(f"a name is not UTF-8 ({error.reason})") from error
    if metadata.get("split.count", 0) not in (0, 1):
        raise UnsupportedModelError(
            f"{file.path}: is one part of a split GGUF. Merge the parts with: "
            "llama-gguf-split --merge FIRST_PART MERGED.gguf"
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {str(alignment)[:40]}, not a power of two")
    data_start = -(-cursor.offset // alignment) * alignment
    layouts = _lay_out(file, infos, data_start)
    return GgufHeader(metadata, layouts, data_start)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


class _Cursor:
    """Reads forward through the file; every read is checked against the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.offset = 0
        self.items_left = _MAX_ARRAY_ITEMS

    def damaged(self, message: str) -> CheckpointError:
        return CheckpointError(
            f"the header is damaged near byte {self.offset}: {message}.",
            file=self.file.path,
            remedy=FETCH_AGAIN,
        )

    def skip(self, count: int) -> int:
        """Move over ``count`` bytes and return where they start."""
        start = self.offset
        if count > self.file.size - start:
            raise self.damaged(f"{count} bytes are expected, {self.file.size - start} are left")
        self.offset = start + count
        return start

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.file.map, self.skip(layout.size))[0]

    def count(self, what: str, limit: int, item_bytes: int) -> int:
        """A 64-bit count of items that take at least ``item_bytes`` each."""
        count: int = self.number("Q")
        if count > limit or count * item_bytes > self.file.size - self.offset:
            raise self.damaged(f"it claims {count} {what}")
        return count

    def string(self, errors: str = "strict") -> str:
        length = self.count("bytes of text", _MAX_STRING_BYTES, 1)
        start = self.skip(length)
        return self.file.map[start : start + length].decode("utf-8", errors)


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and the two counts."""
    magic = cursor.file.map[:4]
    if magic != b"GGUF":
        raise CheckpointError(
            f"is not a GGUF file: it starts with {magic!r}.",
            file=cursor.file.path,
            remedy="Fetch it again, or give a file in GGUF format.",
        )
    cursor.skip(4)
    version: int = cursor.number("I")
    if version not in (2, 3):
        raise UnsupportedModelError(
            f"{cursor.file.path}: is GGUF version {version}; fuserve reads little-endian versions "
            "2 and 3. Fetch a newer conversion of the model."
        )
    tensor_count = cursor.count("tensors", _MAX_TENSORS, 24)
    return tensor_count, cursor.count("metadata keys", _MAX_KEYS, 13)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the metadata key {key[:80]!r} occurs twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind: int = cursor.number("I")
    if kind == _STRING:
        return cursor.string("replace")
    if kind == _ARRAY:
        return _read_array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.damaged(f"the metadata key {key[:80]!r} has the unknown type {kind}")
    if _SCALARS[kind] == "?":
        return cursor.number("B") != 0
    return cursor.number(_SCALARS[kind])


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind: int = cursor.number("I")
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.damaged(f"the metadata key {key[:80]!r} is an array of the type {kind}")
    item_bytes = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
    count = cursor.count("array items", cursor.items_left, item_bytes)
    cursor.items_left -= count
    if kind == _STRING:
        return _read_strings(cursor, count)
    start = cursor.skip(count * item_bytes)
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    items: list[Any] = np.frombuffer(cursor.file.map, dtype, count, start).tolist()
    return items


def _read_strings(cursor: _Cursor, count: int) -> list[str]:
    """Like ``cursor.string`` count times; unrolled, because vocabularies are long."""
    data, size, offset = cursor.file.map, cursor.file.size, cursor.offset
    read_length = struct.Struct("<Q").unpack_from
    strings = []
    for _ in range(count):
        start = offset + 8
        if start > size:
            raise cursor.damaged("an array of texts runs beyond the end of the file")
        offset = start + read_length(data, offset)[0]
        if offset > size or offset - start > _MAX_STRING_BYTES:
            raise cursor.damaged(f"an array item claims {offset - start} bytes of text")
        strings.append(data[start:offset].decode("utf-8", "replace"))
    cursor.offset = offset
    return strings


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string()
    dimensions: int = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name[:80]!r} claims {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    if 0 in shape:
        raise cursor.damaged(f"tensor {name[:80]!r} has a dimension of size 0")
    type_id: int = cursor.number("I")
    return _TensorInfo(name, type_id, shape[::-1], cursor.number("Q"))


def _lay_out(
    file: MappedFile, infos: list[_TensorInfo], data_start: int
) -> dict[str, TensorLayout]:
    layouts: dict[str, TensorLayout] = {}
    for info in infos:
        if info.type_id not in _DTYPES:
            raise UnsupportedModelError(
                f"{file.path}: tensor {info.name!r} has the type {_type_name(info.type_id)}, "
                f"which fuserve cannot read. Use a conversion in one of: "
                f"{', '.join(_DTYPES.values())}."
            )
        if info.name in layouts:
            raise CheckpointError(
                "occurs twice in the header.", file=file.path, tensor=info.name, remedy=FETCH_AGAIN
            )
        dtype = _DTYPES[info.type_id]
        row = info.shape[-1] if info.shape else 1
        if dtype in BLOCK_SIZES and row % BLOCK_SIZES[dtype][0]:
            raise CheckpointError(
                f"rows of {row} elements are not a whole number of {dtype} blocks.",
                file=file.path,
                tensor=info.name,
                remedy=FETCH_AGAIN,
            )
        start = data_start + info.offset
        stop = start + stored_bytes(dtype, info.shape)
        layouts[info.name] = TensorLayout(info.name, dtype, info.shape, start, stop)
    check_within_file(layouts.values(), file)
    return layouts


def _type_name(type_id: int) -> str:
    from gguf.constants import GGMLQuantizationType

    known = {int(one): str(one.name) for one in GGMLQuantizationType}
    return known.get(type_id, f"number {type_id}")
