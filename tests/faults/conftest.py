"""Whole checkpoints for the tests of this folder to damage, and what every damage must end in."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.errors import FuserveError

_ONE_SECOND = 1.0
_LITTLE_MEMORY_BYTES = 48 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with two tensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {
        "model.embed_tokens.weight": np.ones((16, 8), np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A GGUF file with metadata of many kinds, a tokenizer and three tensors."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<s>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 3)
    writer.add_tensor("token_embd.weight", np.ones((4, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float16))
    blocks = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _use(path: Path) -> None:
    """What loading a model does to a checkpoint."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensor_names():
        tensor = checkpoint.tensor(name)
        tensor.data.tobytes()
        checkpoint.release(name)
    checkpoint.content_key()
    if checkpoint.format == "gguf":
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.decode(tokenizer.encode("ab ba"))


@pytest.fixture
def open_and_use() -> Callable[[Path], FuserveError | None]:
    """Uses a whole checkpoint; returns the FuserveError it ends in, lets any other through.

    It must end within a second and with little memory either way.
    """

    def use(path: Path) -> FuserveError | None:
        tracemalloc.start()
        start = time.process_time()
        try:
            _use(path)
            return None
        except FuserveError as error:
            return error
        finally:
            seconds = time.process_time() - start
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert seconds < _ONE_SECOND
            assert peak_bytes < _LITTLE_MEMORY_BYTES

    return use


@pytest.fixture
def write_header(folder: Path) -> Callable[..., Path]:
    """Replaces the folder's weights by this safetensors header and some data."""

    def write(header: object, data_bytes: int = 64, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(text) if length is None else length
        file = folder / "model.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + text + bytes(data_bytes))
        return file

    return write
