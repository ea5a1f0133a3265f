from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuserve.errors import CheckpointError, UnsupportedModelError


def _entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_undamaged_folder_is_read(folder, open_and_use):
    assert open_and_use(folder) is None


def test_a_file_cut_anywhere_is_refused_by_name(folder, open_and_use):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    draw = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *draw.sample(range(len(whole)), 60)]:
        file.write_bytes(whole[:length])
        error = open_and_use(folder)
        assert isinstance(error, CheckpointError), length
        assert str(file) in str(error)
        assert error.remedy


def test_a_cut_in_the_data_names_the_tensor_that_is_lost(folder, open_and_use):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    error = open_and_use(folder)
    assert error is not None and "tensor 'model." in str(error)
    assert "Fetch the file again" in str(error)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 1 << 40])
def test_an_absurd_header_length_is_refused_before_anything_is_read(
    folder, write_header, open_and_use, length
):
    write_header({"a": _entry()}, length=length)
    assert "its header claims" in str(open_and_use(folder))


def test_a_header_beyond_the_cap_is_refused_even_if_the_file_is_as_large(folder, open_and_use):
    file = folder / "model.safetensors"
    length = 40 << 20
    with file.open("wb") as stream:
        stream.write(length.to_bytes(8, "little") + b"{")
        stream.truncate(length + 100)  # sparse
    assert "is refused" in str(open_and_use(folder))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json at all", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        ([], "not a JSON object"),
        (7, "not a JSON object"),
        (b'{"a": {}, "a": {}}', "occurs twice"),
        ({"a": 3}, "tensor 'a'"),
        ({"a": _entry(dtype=None)}, "no dtype"),
        ({"a": _entry(dtype=["F32"])}, "no dtype"),
        ({"a": _entry(shape="4")}, "its shape is"),
        ({"a": _entry(shape=[-4])}, "its shape is"),
        ({"a": _entry(shape=[4.0])}, "its shape is"),
        ({"a": _entry(shape=[True] * 4)}, "its shape is"),
        ({"a": _entry(shape=[1] * 99)}, "its shape is"),
        ({"a": _entry(shape=[2**47, 2**47, 0], offsets=[0, 0])}, "its shape is"),
        ({"a": _entry(shape=[10**30])}, "its shape is"),
        ({"a": _entry(shape=[5])}, "needs 20 bytes, but the header gives it 16"),
        ({"a": _entry(offsets=[16, 0])}, "its data_offsets are"),
        ({"a": _entry(offsets=[0])}, "its data_offsets are"),
        ({"a": _entry(offsets=[-16, 0])}, "its data_offsets are"),
        ({"a": _entry(offsets=[0.0, 16.0])}, "its data_offsets are"),
        ({"a": _entry(offsets=[1 << 60, (1 << 60) + 16])}, "the file has only"),
        ({"a": _entry(offsets=[56, 72])}, "the file has only"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_with_the_reason(
    folder, write_header, open_and_use, header, words
):
    file = write_header(header)
    error = open_and_use(folder)
    assert isinstance(error, CheckpointError)
    assert words in str(error) and str(file) in str(error)


def test_overlapping_tensors_are_refused_naming_both(folder, write_header, open_and_use):
    write_header({"first": _entry(), "second": _entry(offsets=[12, 28])})
    error = open_and_use(folder)
    assert "tensor 'second': its data overlaps that of tensor 'first'" in str(error)


def test_an_unknown_type_is_unsupported_rather_than_damaged(folder, write_header, open_and_use):
    write_header({"a": _entry(dtype="F4", offsets=[0, 2])})
    error = open_and_use(folder)
    assert isinstance(error, UnsupportedModelError) and "'a' has the type F4" in str(error)


def _shard(folder, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards_are_listed(folder, open_and_use):
    _shard(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    error = open_and_use(folder)
    assert "model-1.safetensors, model-2.safetensors" in str(error)
    assert "Fetch the missing files" in str(error)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(folder, open_and_use):
    _shard(folder, {"model.norm.weight": "model.safetensors", "gone": "model.safetensors"})
    error = open_and_use(folder)
    assert "model.safetensors: tensor 'gone': is not in this file" in str(error)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..\\x.safetensors",
     "a/../../x.safetensors", "C:x.safetensors", "x\0.safetensors", "pickle.bin",
     "", None, 3, ["x"]],
)  # fmt: skip
def test_an_index_cannot_point_out_of_its_folder(folder, open_and_use, shard):
    outside = folder.parent / "secret.safetensors"
    outside.write_bytes((folder / "model.safetensors").read_bytes())
    _shard(folder, {"model.norm.weight": shard})
    error = open_and_use(folder)
    assert isinstance(error, CheckpointError)
    assert "which is not a *.safetensors file of this folder" in str(error)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_map_is_refused(folder, open_and_use, weight_map):
    _shard(folder, weight_map)
    assert "has no weight_map" in str(open_and_use(folder))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"a":' * 9999])
def test_a_damaged_config_is_named(folder, open_and_use, file, text):
    (folder / file).write_text(text, encoding="latin-1")
    error = open_and_use(folder)
    assert isinstance(error, CheckpointError) and str(folder / file) in str(error)


def test_a_folder_without_config_or_weights_says_what_is_missing(folder, open_and_use):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in str(open_and_use(folder))
    (folder / "config.json").unlink()
    assert "has no config.json" in str(open_and_use(folder))


def test_a_weights_name_that_is_a_folder_is_refused(folder, open_and_use):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "cannot be read" in str(open_and_use(folder))


_FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_FUZZ
@given(data=st.data())
def test_flipped_bytes_in_a_header_only_ever_raise_our_errors(folder, open_and_use, data):
    file = folder / "model.safetensors"
    original = folder.parent / "original"
    if not original.exists():
        original.write_bytes(file.read_bytes())
    damaged = bytearray(original.read_bytes())
    header_end = 8 + int.from_bytes(damaged[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    open_and_use(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@_FUZZ
@given(header=_JSON | st.binary(max_size=40))
def test_any_header_at_all_only_ever_raises_our_errors(folder, write_header, open_and_use, header):
    write_header(header)
    open_and_use(folder)
