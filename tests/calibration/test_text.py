"""Windows of calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fuserve.calibration.text import packaged_text, sample_windows
from fuserve.checkpoints import Tokenizer, load_tokenizer, open_checkpoint
from fuserve.errors import InvalidRequestError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint("demo"))


def test_windows_are_pieces_of_the_text_in_its_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(40_000))
    (tmp_path / "text.txt").write_text(text)
    windows = sample_windows(tmp_path / "text.txt", tokenizer, 5, 50, seed=3)
    assert windows.shape == (5, 50)
    places = [text.index(tokenizer.decode(window.tolist())[1:-12]) for window in windows]
    assert places == sorted(places)


def test_equal_seeds_choose_equal_windows(tokenizer: Tokenizer) -> None:
    first, second, other = (
        sample_windows(packaged_text(), tokenizer, 8, 64, seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_the_packaged_text_is_enough_for_the_defaults(tokenizer: Tokenizer) -> None:
    assert sample_windows(packaged_text(), tokenizer, 128, 256, 0).shape == (128, 256)


def test_jsonl_has_a_text_a_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = ({"text": f"The number {number} is odd or even. "} for number in range(60))
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert sample_windows(path, tokenizer, 4, 32, 0).shape == (4, 32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    (
        ("short.txt", b"Too short.", "fewer than the 64 tokens"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"te', "line 2 is not JSON"),
        ("empty.jsonl", b'{"content": "a"}\n', "line 1 is no text"),
    ),
)
def test_a_text_that_cannot_be_used_is_refused(
    name: str, content: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=message):
        sample_windows(tmp_path / name, tokenizer, 4, 64, 0)


def test_a_missing_text_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"missing\.txt"):
        sample_windows(tmp_path / "missing.txt", tokenizer, 4, 64, 0)
