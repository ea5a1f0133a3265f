from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np

from fuserve.checkpoints import open_checkpoint


def _key(path) -> str:
    return open_checkpoint(path).content_key()


def test_a_copy_made_later_elsewhere_keeps_the_key(write_folder, write_gguf, tensors, tmp_path):
    folder, file = write_folder(tensors), write_gguf(tensors)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(file, tmp_path / "other-name.gguf")
    for path in (tmp_path / "copy" / "model.safetensors", tmp_path / "other-name.gguf"):
        os.utime(path, (1, 1))
    assert _key(folder) == _key(tmp_path / "copy")
    assert _key(file) == _key(tmp_path / "other-name.gguf")


def test_the_config_the_names_and_one_changed_tensor_change_the_key(write_folder, tensors):
    keys = {_key(write_folder(tensors))}
    keys.add(_key(write_folder(tensors, config={"model_type": "llama", "x": 1}, name="config")))
    renamed = {name + "x": value for name, value in tensors.items()}
    keys.add(_key(write_folder(renamed, name="names")))
    changed = {**tensors, "layer.bias": tensors["layer.bias"] + 1}
    keys.add(_key(write_folder(changed, name="weights")))
    assert len(keys) == 4


def test_fine_tuning_any_single_tensor_of_many_changes_the_key(write_gguf):
    draw = np.random.default_rng(0)
    many = {f"blk.{i}.w": draw.standard_normal((64, 200)).astype(np.float32) for i in range(12)}
    before = _key(write_gguf(many))
    for name in many:
        tuned = {**many, name: many[name] + 1e-3}
        assert _key(write_gguf(tuned, name="tuned.gguf")) != before


def test_shards_have_one_key_together(write_folder, tensors):
    names = list(tensors)
    shards = [{name: tensors[name]} for name in names]
    before = _key(write_folder(*shards))
    shards[1] = {names[1]: tensors[names[1]] * 2}
    assert _key(write_folder(*shards, name="other")) != before


def test_the_key_of_a_gigabyte_costs_milliseconds(write_folder):
    folder = write_folder({"w": np.zeros(1, np.float32)})
    count = 128
    size = 8 << 20
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * size)  # sparse: takes no disk space
    checkpoint = open_checkpoint(folder)
    start = time.process_time()
    checkpoint.content_key()
    assert time.process_time() - start < 0.25  # about 0.01 s when nothing else runs
