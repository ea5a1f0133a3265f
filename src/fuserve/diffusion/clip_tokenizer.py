"""CLIP's tokenizer: lower-cased text in byte-level BPE, whose words end in ``</w>``.

From ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt``, of which the tokenizer is put
together as its authors describe it (Radford et al., arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fuserve.checkpoints.huggingface_tokenizer import read_backend
from fuserve.checkpoints.json_file import read_json_object_if_there
from fuserve.errors import CheckpointError

_START, _END = "<|startoftext|>", "<|endoftext|>"
_DEFAULTS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Prompts to rows of a fixed number of tokens: start, text, end, padding.

    Args:
        backend: encodes text, without start and end.
        start: token id put before.
        end: token id put behind; text too long for a row is cut before it.
        padding: token id of the rest.
        max_tokens: length of a row.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, start: int, end: int, padding: int, max_tokens: int
    ) -> None:
        self._backend = backend
        self.start, self.end, self.padding = start, end, padding
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> ClipTokenizer:
        """From a tokenizer's folder; rows have the length it says, at most ``max_tokens``.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        settings = {
            **read_json_object_if_there(folder / "special_tokens_map.json"),
            **read_json_object_if_there(folder / "tokenizer_config.json"),
        }
        names = {key: _text(settings.get(key)) or text for key, text in _DEFAULTS.items()}
        if (folder / "tokenizer.json").exists():
            backend = read_backend(folder / "tokenizer.json")
        else:
            backend = _from_merges(folder, names, settings)
        length = settings.get("model_max_length")
        if isinstance(length, int) and 2 < length < max_tokens:
            max_tokens = length
        start, end, padding = (
            _id(backend, names[key], folder) for key in ("bos_token", "eos_token", "pad_token")
        )
        return cls(backend, start, end, padding, max_tokens)

    def padded_with(self, token: str) -> ClipTokenizer:
        """The same tokenizer with another padding, which then is a special token too."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        padding = backend.token_to_id(token)
        assert padding is not None  # it has just been added, if it was not there
        return ClipTokenizer(backend, self.start, self.end, padding, self.max_tokens)

    def __call__(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids  # [prompts, max_tokens]."""
        rows = np.full((len(prompts), self.max_tokens), self.padding, np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.text_ids(prompt)[: self.max_tokens - 2]
            row[: len(ids) + 2] = [self.start, *ids, self.end]
        return rows

    def text_ids(self, prompt: str) -> list[int]:
        """The whole prompt's tokens, without start and end: more than fit are cut off."""
        return list(self._backend.encode(prompt, add_special_tokens=False).ids)


def _from_merges(
    folder: Path, names: Mapping[str, str], settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for file in (vocabulary, merges):
        if not file.exists():
            raise CheckpointError(
                "the tokenizer is missing.",
                file=file,
                remedy="Fetch tokenizer.json, or vocab.json and merges.txt, into the folder.",
            )
    try:
        model = models.BPE.from_file(
            str(vocabulary),
            str(merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=names["unk_token"],
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"is no tokenizer that can be read ({error}).",
            file=vocabulary,
            remedy="Fetch vocab.json and merges.txt again.",
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_added(settings.get(key), text) for key, text in names.items()])
    return backend


def _added(described: Any, text: str) -> AddedToken:
    """A special token, found in a text before it is cut into words."""
    if not isinstance(described, Mapping):
        return AddedToken(text, special=True, normalized=False)
    flags = {
        key: bool(described.get(key, False))
        for key in ("lstrip", "rstrip", "single_word", "normalized")
    }
    return AddedToken(text, special=True, **flags)


def _text(token: Any) -> str | None:
    """A special token is written as its text or as a description with its text."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id(backend: tokenizers.Tokenizer, text: str, folder: Path) -> int:
    number = backend.token_to_id(text)
    if number is None:
        raise CheckpointError(
            f"the vocabulary has no {text!r}, which the tokenizer's settings name.",
            file=folder,
            remedy="Fetch the tokenizer's files again.",
        )
    return int(number)
