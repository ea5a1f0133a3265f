"""Windows of tokens to calibrate on, from a text file or JSONL that is read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints import Tokenizer
from fuserve.errors import InvalidRequestError

PIECE_CHARACTERS = 1 << 16
"""How much of a text file is tokenized together."""

Tokens = npt.NDArray[np.int32]


def packaged_text() -> Path:
    """The English prose that comes with the package."""
    return Path(str(files("fuserve.calibration") / "data" / "english.txt"))


def sample_windows(
    path: Path, tokenizer: Tokenizer, num_samples: int, sample_tokens: int, seed: int
) -> Tokens:
    """Windows of a text, chosen at random, in the order of the text.  # [samples, tokens]

    Texts are tokenized one after the other and laid end to end. Fewer windows come back where the
    text has no more. Only the chosen windows are held in memory (reservoir sampling).

    Args:
        path: UTF-8 text, or ``.jsonl`` with a text in the field ``text`` of each line.
        tokenizer: the model's.
        num_samples: windows wanted.
        sample_tokens: tokens of each.
        seed: of the choice.

    Raises:
        InvalidRequestError: the file cannot be read, or has less than one window.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[int, tuple[int, Tokens]] = {}  # place in the reservoir -> place in the text
    for index, window in enumerate(_windows(path, tokenizer, sample_tokens)):
        place = index if index < num_samples else int(rng.integers(index + 1))
        if place < num_samples:
            chosen[place] = (index, window)
    if not chosen:
        raise InvalidRequestError(
            f"{path}: has fewer than the {sample_tokens} tokens of one sample; give a longer text."
        )
    return np.stack([window for _, window in sorted(chosen.values(), key=lambda one: one[0])])


def _windows(path: Path, tokenizer: Tokenizer, sample_tokens: int) -> Iterator[Tokens]:
    left: list[int] = []
    for text in _texts(path):
        left.extend(tokenizer.encode(text, add_special_tokens=False))
        whole = len(left) // sample_tokens * sample_tokens
        for start in range(0, whole, sample_tokens):
            yield np.array(left[start : start + sample_tokens], np.int32)
        del left[:whole]


def _texts(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(path, number, line)
                return
            # A line may be the whole text, so it is read in pieces, each up to the end of a word.
            rest = ""
            while piece := file.read(PIECE_CHARACTERS):
                head, space, tail = (rest + piece).rpartition(" ")
                yield head
                rest = space + tail
            yield rest
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"{path}: line {number} is not JSON ({error}).") from error
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"{path}: line {number} is no text and has no text in a field 'text'."
        )
    return text
