"""The Hugging Face folder that is written: shards, index, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints import Checkpoint, load_tokenizer
from fuserve.checkpoints.mapped_file import MappedFile
from fuserve.checkpoints.safetensors_header import read_safetensors_header
from fuserve.checkpoints.safetensors_writer import write_index, write_safetensors

Array = npt.NDArray[np.generic]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class OutputFolder:
    """Shards are written one by one, each complete or not there; the index comes last.

    Args:
        path: the folder; made if it is not there.
        num_shards: how many there will be.
    """

    def __init__(self, path: Path, num_shards: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._num_shards = num_shards

    def write_shard(self, number: int, arrays: Mapping[str, Array]) -> None:
        """Write shard ``number``, from 1 on."""
        write_safetensors(self._path / self._name(number), arrays)

    def finish(self, source: Checkpoint) -> tuple[list[str], int]:
        """Write the index and the tokenizer; returns names and bytes of all tensors."""
        places: dict[str, str] = {}
        total = 0
        for number in range(1, self._num_shards + 1):
            layouts, _ = read_safetensors_header(MappedFile(self._path / self._name(number)))
            places |= dict.fromkeys(layouts, self._name(number))
            total += sum(layout.stop - layout.start for layout in layouts.values())
        write_index(self._path, places, total)
        _write_tokenizer(self._path, source)
        return list(places), total

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._num_shards:05d}.safetensors"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json, which makes the folder a model."""
        _write_json(self._path / "config.json", config)


def _write_tokenizer(path: Path, source: Checkpoint) -> None:
    if source.format == "huggingface":
        for name in TOKENIZER_FILES:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, path / name)
        return
    tokenizer = load_tokenizer(source)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.metadata.get(
            f"{source.metadata['general.architecture']}.context_length"
        ),
    }
    if tokenizer.has_chat_template:
        settings["chat_template"] = tokenizer.chat_template_source
    (path / "tokenizer.json").write_text(tokenizer.tokenizer_json(), encoding="utf-8")
    _write_json(path / "tokenizer_config.json", settings)
    ends = sorted(tokenizer.eos_token_ids)
    _write_json(path / "generation_config.json", {"eos_token_id": ends})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
