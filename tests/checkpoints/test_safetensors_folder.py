from __future__ import annotations

import json

import numpy as np
import psutil
import pytest

from fuserve.checkpoints import open_checkpoint, to_float32
from fuserve.errors import CheckpointError, UnsupportedModelError


def test_a_folder_gives_its_config_and_every_tensor_as_it_was_saved(write_folder, tensors):
    folder = write_folder(tensors, config={"model_type": "llama", "hidden_size": 8})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.path) == ("huggingface", folder)
    assert checkpoint.metadata["hidden_size"] == 8
    assert checkpoint.generation_config == {}
    assert set(checkpoint.tensor_names()) == set(tensors)
    assert "layer.bias" in checkpoint and "other" not in checkpoint
    for name, saved in tensors.items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == checkpoint.shape(name) == saved.shape
        assert tensor.dtype == checkpoint.dtype(name)
        np.testing.assert_array_equal(tensor.data, saved)
        np.testing.assert_array_equal(to_float32(tensor), saved.astype(np.float32))


def test_shards_read_like_one_file(write_folder, tensors):
    names = list(tensors)
    shards = [{name: tensors[name]} for name in names]
    checkpoint = open_checkpoint(write_folder(*shards))
    assert set(checkpoint.tensor_names()) == set(names)
    for name in names:
        np.testing.assert_array_equal(checkpoint.tensor(name).data, tensors[name])


def test_weights_are_mapped_and_cannot_be_written(write_folder, tensors):
    checkpoint = open_checkpoint(write_folder(tensors))
    data = checkpoint.tensor("embed.weight").data
    assert not data.flags.owndata and not data.flags.writeable
    assert np.shares_memory(data, checkpoint.tensor("embed.weight").data)


def test_released_pages_read_the_same_again(write_folder):
    big = {"big": np.arange(1 << 18, dtype=np.float32)}
    checkpoint = open_checkpoint(write_folder(big))
    data = checkpoint.tensor("big").data
    assert data.sum(dtype=np.float64) == big["big"].sum(dtype=np.float64)
    checkpoint.release("big")
    np.testing.assert_array_equal(data, big["big"])


def test_bfloat16_is_read_as_its_bits_and_widened_exactly(write_folder):
    values = np.array([[0.0, -1.5, 3.140625], [2.0**100, -(2.0**-130), np.inf]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    folder = write_folder({"x": np.zeros(1, np.float32)})
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    tensor = open_checkpoint(folder).tensor("w")
    assert tensor.dtype == "BF16" and tensor.data.dtype == np.uint16
    np.testing.assert_array_equal(to_float32(tensor), values)


def test_elements_that_a_file_misaligns_are_still_aligned_for_kernels(write_folder):
    folder = write_folder({"x": np.zeros(1, np.float32)})
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    header += " " * ((1 - len(header)) % 8)  # data starts at an odd byte
    data = np.array([1.5, -2.0], "<f4").tobytes()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    tensor = open_checkpoint(folder).tensor("w")
    assert tensor.data.flags.aligned
    assert tensor.data.tolist() == [1.5, -2.0]


def test_integer_buffers_are_readable_but_are_no_weights(write_folder):
    checkpoint = open_checkpoint(write_folder({"mask": np.ones((2, 2), np.bool_)}))
    assert checkpoint.tensor("mask").data.all()
    with pytest.raises(UnsupportedModelError, match=r"'mask'.*BOOL.*F32, F16, BF16"):
        to_float32(checkpoint.tensor("mask"))


def test_releasing_a_tensor_gives_its_memory_back(write_folder):
    size = 32 << 20
    checkpoint = open_checkpoint(write_folder({"big": np.ones(size // 4, np.float32)}))
    process = psutil.Process()
    data = checkpoint.tensor("big").data
    before = process.memory_info().rss
    assert data.sum() == size // 4
    while_read = process.memory_info().rss
    checkpoint.release("big")
    after = process.memory_info().rss
    assert while_read - before > size // 2
    assert while_read - after > size // 2


def test_an_unknown_name_is_answered_with_the_similar_ones(write_folder, tensors):
    checkpoint = open_checkpoint(write_folder(tensors))
    with pytest.raises(CheckpointError, match=r"'layer\.weigth'.*Similar names: layer\.weight"):
        checkpoint.tensor("layer.weigth")


def test_a_slice_of_rows_keeps_shape_and_data(write_folder, tensors):
    rows = open_checkpoint(write_folder(tensors)).tensor("embed.weight").rows(4, 9)
    assert rows.shape == (5, 8)
    np.testing.assert_array_equal(rows.data, tensors["embed.weight"][4:9])


def test_the_generation_config_is_read_where_there_is_one(write_folder, tensors):
    folder = write_folder(tensors)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(folder).generation_config == {"eos_token_id": [1, 2]}
