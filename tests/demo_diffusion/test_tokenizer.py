"""The demo model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from tools.demo_diffusion import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(place, max_tokens=24)
    return place


def test_each_word_of_the_captions_is_one_token(folder: Path) -> None:
    words = tokenizer.words()
    ids = CLIPTokenizer.from_pretrained(folder)(" ".join(words[:20])).input_ids
    assert len(ids) == 22
    assert {"circle", "purple", "background", "left"} <= set(words)


def test_any_other_text_is_spelled_in_pieces(folder: Path) -> None:
    loaded = CLIPTokenizer.from_pretrained(folder)
    text = "zebra wörld ☃"
    ids = loaded(text).input_ids
    assert loaded.unk_token_id not in ids[:-1]
    assert loaded.decode(ids, skip_special_tokens=True) == text


def test_vocabulary_and_merges_alone_tokenize_alike(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = "a small red circle to the left of a fence"
    whole, parts = (CLIPTokenizer.from_pretrained(place) for place in (folder, tmp_path))
    assert whole(text).input_ids == parts(text).input_ids
