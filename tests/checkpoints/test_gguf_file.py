from __future__ import annotations

import gguf
import numpy as np
import pytest

from fuserve.checkpoints import open_checkpoint, to_float32
from fuserve.errors import CheckpointError, UnsupportedModelError


def test_the_demo_file_reads_as_ggufs_own_reader_reads_it(demo):
    reader = gguf.GGUFReader(demo.path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    ours = demo.metadata
    assert {name: theirs[name] for name in ours} == dict(ours)
    assert [one.name for one in reader.tensors] == list(demo.tensor_names())
    for one in reader.tensors:
        tensor = demo.tensor(one.name)
        assert tensor.dtype == one.tensor_type.name
        assert tensor.shape == tuple(int(size) for size in reversed(one.shape))
        np.testing.assert_array_equal(tensor.data, one.data)


def test_metadata_of_every_kind_comes_as_plain_python_values(write_gguf):
    metadata = {
        "a.text": "héllo 👍",
        "a.flag": True,
        "a.number": 4_000_000_000,
        "a.float": 0.5,
        "a.texts": ["x", "", "日本"],
        "a.numbers": [1, 2, 3],
        "a.floats": [0.5, -1.0],
        "a.flags": [True, False],
    }
    checkpoint = open_checkpoint(write_gguf(metadata=metadata))
    assert checkpoint.format == "gguf"
    assert {key: checkpoint.metadata[key] for key in metadata} == metadata
    assert all(type(one) is int for one in checkpoint.metadata["a.numbers"])
    assert checkpoint.metadata["general.architecture"] == "llama"


def test_shapes_are_out_by_in_and_data_is_aligned(write_gguf):
    weights = np.arange(15, dtype=np.float32).reshape(5, 3)
    bias = np.arange(5, dtype=np.float16)
    checkpoint = open_checkpoint(write_gguf({"w": weights, "b": bias}))
    assert checkpoint.shape("w") == (5, 3) and checkpoint.dtype("b") == "F16"
    np.testing.assert_array_equal(checkpoint.tensor("w").data, weights)
    np.testing.assert_array_equal(to_float32(checkpoint.tensor("b")), bias.astype(np.float32))
    checkpoint.release("w")
    np.testing.assert_array_equal(checkpoint.tensor("w").data, weights)


def test_a_block_type_fuserve_cannot_read_is_named_with_its_tensor(write_gguf):
    kind = gguf.GGMLQuantizationType.IQ4_NL
    path = write_gguf({"blk.0.attn_q.weight": (np.zeros((2, 18), np.uint8), kind)})
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.attn_q\.weight'.*IQ4_NL.*Q4_K"):
        open_checkpoint(path)


def test_a_part_of_a_split_file_says_how_to_merge(write_gguf):
    with pytest.raises(UnsupportedModelError, match="llama-gguf-split --merge"):
        open_checkpoint(write_gguf(metadata={"split.count": 3}))


def test_an_unknown_tensor_name_is_a_checkpoint_error(demo):
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_qq\.weight'.*blk\.0\.attn_q\.weight"):
        demo.tensor("blk.0.attn_qq.weight")
