"""The tokenizer gives transformers' tokens, from either form of its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from fuserve.diffusion.clip_tokenizer import ClipTokenizer
from fuserve.errors import CheckpointError

MERGES = [
    ("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("cir", "c"), ("l", "e</w>"),
    ("circ", "le</w>"), ("a", "b"), ("o", "v"), ("ab", "ov"), ("abov", "e</w>"),
]  # fmt: skip
TEXTS = [
    "",
    "a red circle",
    "  A RED\n\tcircle,above: above! 'tis it's 12 34",
    "naïve café 東京 🎨 é",
    "<|endoftext|> red <|startoftext|>",
    "red " * 40,
    "!!! ... circle's",
]


def write_vocabulary(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])  # of CLIP-L, and of SDXL's second
@pytest.mark.parametrize("form", ["merges", "json"])
def test_tokens_are_those_of_transformers(tmp_path: Path, padding: str, form: str) -> None:
    write_vocabulary(tmp_path / "source")
    settings = {"pad_token": padding, "model_max_length": 30}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    oracle = CLIPTokenizer.from_pretrained(tmp_path / "source")
    if form == "json":
        oracle.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "tokenizer.json").exists()
    ours = ClipTokenizer.load(tmp_path / ("saved" if form == "json" else "source"), 77)
    assert ours.max_tokens == 30
    theirs = oracle(TEXTS, padding="max_length", max_length=30, truncation=True).input_ids
    np.testing.assert_array_equal(ours(TEXTS), theirs)


def test_words_are_merged_and_a_long_prompt_keeps_its_end(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    tokenizer = ClipTokenizer.load(tmp_path, 8)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    red = vocabulary["red</w>"]
    assert tokenizer.text_ids("RED circle") == [red, vocabulary["circle</w>"]]
    row = tokenizer(["red " * 20])[0].tolist()
    assert row == [tokenizer.start, *[red] * 6, tokenizer.end]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json: the tokenizer is missing"):
        ClipTokenizer.load(tmp_path, 77)
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such merge at all\n")
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        ClipTokenizer.load(tmp_path, 77)
