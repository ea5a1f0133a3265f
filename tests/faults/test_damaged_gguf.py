from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuserve.checkpoints import open_checkpoint
from fuserve.errors import CheckpointError, UnsupportedModelError

_U8, _U32, _F32, _STRING, _ARRAY, _U64 = 0, 4, 6, 8, 9, 10


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _tensor(
    name: bytes = b"w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


def _file(
    path: Path,
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data_bytes: int = 64,
) -> Path:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count)
    body = header + b"".join(keys) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(data_bytes))
    return path


def test_the_undamaged_file_is_read(gguf_file, open_and_use):
    assert open_and_use(gguf_file) is None


def test_a_hand_made_file_is_read(tmp_path, open_and_use):
    """So that the refusals below are for the damage, not for how this file writes GGUF."""
    keys = (
        _key(b"a", _ARRAY, struct.pack("<IQ3B", _U8, 3, 1, 2, 3)),
        _key(b"b", _STRING, _text(b"x")),
    )
    checkpoint = open_checkpoint(_file(tmp_path / "m.gguf", *keys, tensors=(_tensor(),)))
    assert checkpoint.metadata == {"a": [1, 2, 3], "b": "x"}
    assert checkpoint.tensor("w").data.tolist() == [0.0] * 8


def test_a_file_cut_anywhere_is_refused_by_name(gguf_file, open_and_use):
    whole = gguf_file.read_bytes()
    data_end = len(whole) - 32  # the writer pads the last tensor
    draw = random.Random(0)
    for length in [0, 3, 4, 8, 23, 24, data_end - 1, *draw.sample(range(data_end), 120)]:
        gguf_file.write_bytes(whole[:length])
        error = open_and_use(gguf_file)
        assert isinstance(error, CheckpointError), length
        assert str(gguf_file) in str(error)
        assert error.remedy


def test_a_cut_in_the_data_names_the_tensor_that_is_lost(gguf_file, open_and_use):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-200])
    error = open_and_use(gguf_file)
    assert "tensor 'output.weight': its data ends at byte" in str(error)


def test_a_cut_of_the_demo_model_is_refused_at_once(tmp_path, open_and_use):
    demo = open_checkpoint("demo").path
    cut = tmp_path / "cut.gguf"
    with demo.open("rb") as source:
        cut.write_bytes(source.read(1_000_000))  # within the vocabulary
    assert isinstance(open_and_use(cut), CheckpointError)


@pytest.mark.parametrize(
    "counts", [(2**64 - 1, 0), (0, 2**64 - 1), (10**9, 10**9), (1, 0), (0, 50)]
)
def test_absurd_counts_are_refused(tmp_path, open_and_use, counts):
    error = open_and_use(_file(tmp_path / "m.gguf", counts=counts))
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (struct.pack("<Q", 2**63) + b"x", "bytes of text"),
        (_key(b"\xff\xff", _U8, b"\1"), "not UTF-8"),
        (_key(b"k", 99, b""), "unknown type 99"),
        (_key(b"k", _STRING, struct.pack("<Q", 10**15)), "bytes of text"),
        (_key(b"k", _ARRAY, struct.pack("<IQ", _U8, 2**62)), "array items"),
        (_key(b"k", _ARRAY, struct.pack("<IQ", _STRING, 2**62)), "array items"),
        (_key(b"k", _ARRAY, struct.pack("<IQQ", _STRING, 2, 10**15)), "bytes of text"),
        (_key(b"k", _ARRAY, struct.pack("<IQQ", _STRING, 8, 60)), "beyond the end"),
        (_key(b"k", _ARRAY, struct.pack("<IQ", _ARRAY, 1)), "array of the type 9"),
        (_key(b"k", _ARRAY, struct.pack("<IQ", 77, 1)), "array of the type 77"),
        (_key(b"general.alignment", _U32, struct.pack("<I", 0)), "not a power of two"),
        (_key(b"general.alignment", _U32, struct.pack("<I", 24)), "not a power of two"),
        (_key(b"general.alignment", _U64, struct.pack("<Q", 2**63)), "not a power of two"),
        (_key(b"general.alignment", _F32, struct.pack("<f", 32)), "not a power of two"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_with_the_reason(
    tmp_path, open_and_use, key, words
):
    error = open_and_use(_file(tmp_path / "m.gguf", key))
    assert isinstance(error, CheckpointError)
    assert words in str(error) and "m.gguf" in str(error)


def test_a_metadata_key_must_not_occur_twice(tmp_path, open_and_use):
    key = _key(b"k", _U8, b"\1")
    assert "'k' occurs twice" in str(open_and_use(_file(tmp_path / "m.gguf", key, key)))


def test_many_arrays_together_cannot_take_much_memory_or_time(tmp_path, open_and_use):
    items = 1 << 21
    arrays = [
        _key(b"k%d" % i, _ARRAY, struct.pack("<IQ", _U8, items) + bytes(items)) for i in range(8)
    ]
    assert "array items" in str(open_and_use(_file(tmp_path / "m.gguf", *arrays)))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (_tensor(name=b"\xff"), "not UTF-8"),
        (_tensor(shape=(1, 1, 1, 1, 1)), "claims 5 dimensions"),
        (_text(b"w") + struct.pack("<I", 2**32 - 1) + bytes(64), "dimensions"),
        (_tensor(shape=(0, 8)), "dimension of size 0"),
        (_tensor(shape=(2**63, 2**63)), "the file has only"),
        (_tensor(shape=(2**32, 2**32, 2**32, 2**32)), "the file has only"),
        (_tensor(offset=64), "the file has only"),
        (_tensor(offset=2**63), "the file has only"),
        (_tensor(shape=(33,), kind=8), "rows of 33 elements are not a whole number of Q8_0 blocks"),
        (_tensor(shape=(32, 8), kind=12), "not a whole number of Q4_K blocks"),
    ],
)
def test_a_tensor_that_makes_no_sense_is_refused_with_the_reason(
    tmp_path, open_and_use, tensor, words
):
    error = open_and_use(_file(tmp_path / "m.gguf", tensors=(tensor,)))
    assert isinstance(error, CheckpointError)
    assert words in str(error) and "m.gguf" in str(error)


def test_overlapping_tensors_are_refused_naming_both(tmp_path, open_and_use):
    both = (_tensor(b"first"), _tensor(b"second", offset=16))
    error = open_and_use(_file(tmp_path / "m.gguf", tensors=both))
    assert "tensor 'second': its data overlaps that of tensor 'first'" in str(error)


def test_a_tensor_must_not_occur_twice(tmp_path, open_and_use):
    both = (_tensor(), _tensor(offset=32))
    assert "tensor 'w': occurs twice" in str(open_and_use(_file(tmp_path / "m.gguf", tensors=both)))


def test_an_unknown_tensor_type_is_unsupported(tmp_path, open_and_use):
    error = open_and_use(_file(tmp_path / "m.gguf", tensors=(_tensor(kind=200),)))
    assert isinstance(error, UnsupportedModelError)
    assert "tensor 'w' has the type number 200" in str(error)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_versions_and_byte_orders_are_unsupported(tmp_path, open_and_use, version):
    error = open_and_use(_file(tmp_path / "m.gguf", version=version))
    assert isinstance(error, UnsupportedModelError) and "versions 2 and 3" in str(error)


@pytest.mark.parametrize("start", [b"PK\3\4", b"\x80\4\x95.", b"<html", b"version https://git-lfs"])
def test_a_file_that_is_no_gguf_says_how_it_starts(tmp_path, open_and_use, start):
    path = tmp_path / "m.gguf"
    path.write_bytes(start + bytes(100))
    assert "is not a GGUF file" in str(open_and_use(path))


_FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_FUZZ
@given(data=st.data())
def test_flipped_bytes_in_a_header_only_ever_raise_our_errors(gguf_file, open_and_use, data):
    original = gguf_file.with_suffix(".original")
    if not original.exists():
        original.write_bytes(gguf_file.read_bytes())
    damaged = bytearray(original.read_bytes())
    header_end = damaged.rindex(b"output.weight") + 40
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_end))] = data.draw(st.integers(0, 255))
    gguf_file.write_bytes(damaged)
    open_and_use(gguf_file)


@_FUZZ
@given(rest=st.binary(max_size=200), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_any_bytes_after_the_magic_only_ever_raise_our_errors(tmp_path, open_and_use, rest, counts):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)
    open_and_use(path)
