"""Small checkpoints and odd texts that the tests of this folder share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fuserve.checkpoints import Checkpoint, Tokenizer, load_tokenizer, open_checkpoint

_PIECES = (
    "hello world", "Straße", "don't", "I'LL", "  ", "   x", "\n", "\n\n\n", "\r\n", "\t\t",
    "\u00a0",
    "\u2003", "\u200b", "\ufeff", "\x00", "\x07", "\x1b[0m", "\x7f", "0", "12", "  2024", "3.14159",
    "1,000,000", "²³", "½", "Ⅷ", "٣٤٥", "१२३", "日本語テキスト", "你好，世界", "한국어",
    "مرحبا بالعالم",
    "שלום", "नमस्ते", "สวัสดี", "e\u0301", "é", "a\u0328\u0301", "ﬁ", "\u212b", "Å", "👍🏽", "👩‍👩‍👧‍👦",
    "🏳️‍🌈", "🇩🇪", "🤷🏼‍♀️", "𝕬𝖇𝖈", "𓀀", "\U0010ffff", "\ufffd", "▁", "▁▁x", "Ġ",
    "<0x41>", "<s>", "</s>",
    "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "|>", "{% if %}", "a" * 70,
    "=" * 33,
    "-" * 80, " " * 41, "!?…", "—", "“q”", "C:\\a\\b", "https://x.y/z?q=1&r=2",
    "snake_case_name", "CamelCaseName",
)  # fmt: skip


@pytest.fixture(scope="session")
def unicode_texts() -> list[str]:
    """Texts that tokenizers get wrong, and 500 random mixtures, always the same."""
    draw = random.Random(20240)
    texts = ["", *_PIECES]
    for _ in range(350):
        joint = draw.choice(["", "", " ", "\n"])
        texts.append(joint.join(draw.choices(_PIECES, k=draw.randint(2, 9))))
    for _ in range(150):
        ranges = [(0, 0x7F), (0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x10FFFF)]
        low, high = draw.choice(ranges)
        texts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 24))))
    return texts


@pytest.fixture(scope="session")
def spellable_texts(unicode_texts: list[str]) -> list[str]:
    """Those that SmolLM can spell: its vocabulary lacks tokens for some bytes."""
    lacking = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, *range(0xF1, 0x100)}
    texts = [text for text in unicode_texts if not lacking & set(text.encode())]
    assert len(texts) > 400
    return texts


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return open_checkpoint("demo")


@pytest.fixture(scope="session")
def demo_tokenizer(demo: Checkpoint) -> Tokenizer:
    return load_tokenizer(demo)


@pytest.fixture(scope="session")
def transformers_demo_tokenizer(demo: Checkpoint) -> Any:
    """transformers' tokenizer for the same file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(demo.path.parent), gguf_file=demo.path.name)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "embed.weight": draw.standard_normal((32, 8)).astype(np.float32),
        "layer.weight": draw.standard_normal((8, 8)).astype(np.float16),
        "layer.bias": np.arange(8, dtype=np.float32),
    }


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Hugging Face folder; with several groups of tensors, one shard for each."""

    def write(
        *shards: Mapping[str, np.ndarray],
        config: Mapping[str, Any] | None = None,
        name: str = "model",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        if len(shards) == 1:
            save_file(dict(shards[0]), folder / "model.safetensors")
            return folder
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(dict(shard), folder / file)
            weight_map.update(dict.fromkeys(shard, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file; block types are given as (uint8 rows, type)."""
    import gguf

    def write(
        tensors: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        architecture: str = "llama",
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (metadata or {}).items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_string(key, value)
        for tensor, value in (tensors or {}).items():
            data, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
