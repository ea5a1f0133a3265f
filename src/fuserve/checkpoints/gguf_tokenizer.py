"""The tokenizer of a GGUF file, built from its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fuserve.checkpoints.chat_template import ChatTemplate
from fuserve.checkpoints.pre_tokenizers import PRE_TOKENIZER_KINDS
from fuserve.checkpoints.tokenizer import SpecialTokens, Tokenizer
from fuserve.errors import CheckpointError, FuserveError, UnsupportedModelError

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_ENDS_OF_TURN = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
)
"""Control tokens that end a turn whatever the metadata says: many files name only one end."""

_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that ``tokenizer.ggml.*`` describes.

    Raises:
        CheckpointError: the description is missing or contradicts itself.
        UnsupportedModelError: it is of a kind that fuserve does not know.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(path, metadata)
    try:
        if model == "gpt2":
            backend = _byte_level(path, metadata, tokens)
        elif model == "llama":
            backend = _sentencepiece(path, metadata, tokens)
        else:
            raise UnsupportedModelError(
                f"{path}: its tokenizer is of the kind {model!r}; fuserve knows 'gpt2' and 'llama'."
            )
    except FuserveError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, e.g. for a merge of no token
        raise CheckpointError(
            f"no tokenizer can be built from its metadata ({error}).",
            file=path,
            remedy="Fetch or convert the file again.",
        ) from error
    special = _special_tokens(path, metadata, tokens)
    _add_special(backend, tokens, _types(path, metadata, tokens), special)
    backend.post_processor = _around_a_text(metadata, special)
    return Tokenizer(
        backend,
        vocab_size=len(tokens),
        special=special,
        chat_template=_chat_template(path, metadata, special.names),
    )


def _tokens(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _are_texts(tokens) or not tokens:
        raise CheckpointError(
            "has no tokenizer: tokenizer.ggml.tokens is missing or holds no texts.",
            file=path,
            remedy="Convert the model again with its tokenizer.",
        )
    texts: list[str] = tokens
    return texts


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{name}", default))


def _column(path: Path, metadata: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """One number for each token; empty where the file has none."""
    column = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(column, list) or (column and len(column) != count):
        raise CheckpointError(
            f"tokenizer.ggml.{name} does not have one entry for each of the {count} tokens.",
            file=path,
            remedy="Fetch or convert the file again.",
        )
    return column


def _byte_level(
    path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    """GPT-2's BPE over bytes, each byte spelled as one printable character."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    kind = PRE_TOKENIZER_KINDS.get(pre)
    if kind is None:
        raise UnsupportedModelError(
            f"{path}: its pre-tokenizer {pre!r} is not known. Known: "
            f"{', '.join(PRE_TOKENIZER_KINDS)}. Use the Hugging Face folder of this model instead."
        )
    vocabulary = {text: number for number, text in enumerate(tokens)}
    merges = _merges(metadata)
    if merges is None:
        raise ValueError("tokenizer.ggml.merges is missing")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.whole_pieces_first)
    )
    if kind.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    lines = metadata.get("tokenizer.ggml.merges")
    if lines is None:
        return None
    if not _are_texts(lines):
        raise ValueError("tokenizer.ggml.merges holds no texts")
    merges = []
    for line in lines:
        # Either part may itself start with a space, so the separator is sought from the second
        # character on.
        cut = line.find(" ", 1)
        if cut < 0:
            raise ValueError(f"the merge {line[:40]!r} has no two parts")
        merges.append((line[:cut], line[cut + 1 :]))
    return merges


def _sentencepiece(
    path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: spaces are written as U+2581, unknown characters as their bytes."""
    architecture = str(metadata.get("general.architecture", ""))
    is_gemma = architecture.startswith("gemma")
    scores = _column(path, metadata, "scores", len(tokens))
    if is_gemma:
        # Gemma's runs of spaces are stored as such, and its merges rank in the tokens' order.
        tokens = [_SPACE * len(text) if text and not text.strip(" ") else text for text in tokens]
        scores = []
    vocabulary = {text: number for number, text in enumerate(tokens)}
    unknown = _token_id(path, metadata, "unknown_token_id", tokens) if is_gemma else None
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(metadata) or _merges_from_scores(vocabulary, tokens, scores),
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    _write_spaces(backend, architecture, _flag(metadata, "add_space_prefix", not is_gemma))
    return backend


def _write_spaces(backend: tokenizers.Tokenizer, architecture: str, prefix: bool) -> None:
    """How spaces become U+2581 and back; with ``prefix``, the text gets a space before it."""
    parts: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if not prefix:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    elif architecture == "phi3":
        # Phi-3 puts the space even before a text that starts with one, and after special tokens.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
    if prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(parts)


def _merges_from_scores(
    vocabulary: Mapping[str, int], tokens: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every way to make a token of two, best score first.

    Without scores the tokens' order is their rank. Of the ways to make one token, that with the
    longest left part comes first, as in transformers.
    """
    best_first = sorted(
        range(len(tokens)), key=lambda number: -scores[number] if scores else number
    )
    merges = []
    for number in best_first:
        text = tokens[number]
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in vocabulary and text[cut:] in vocabulary:
                merges.append((text[:cut], text[cut:]))
    return merges


def _types(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    return _column(path, metadata, "token_type", len(tokens)) or [_NORMAL] * len(tokens)


def _add_special(
    backend: tokenizers.Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    special: SpecialTokens,
) -> None:
    """Control tokens and those with a role are special; user-defined ones are only never cut."""
    with_a_role = set(special.names.values())
    control, user_defined = [], []
    for text, kind in zip(tokens, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL) or text in with_a_role:
            control.append(AddedToken(text, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(text, normalized=False, special=False))
    backend.add_special_tokens([one for one in control if one.content])
    backend.add_tokens([one for one in user_defined if one.content])


def _around_a_text(metadata: Mapping[str, Any], special: SpecialTokens) -> TemplateProcessing:
    """Puts BOS and EOS around a text if the file says so; Llama's kind has BOS by default."""
    is_llama = metadata.get("tokenizer.ggml.model") == "llama"
    bos = special.names.get("bos_token") if _flag(metadata, "add_bos_token", is_llama) else None
    eos = special.names.get("eos_token") if _flag(metadata, "add_eos_token", False) else None
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    return TemplateProcessing(
        single=[piece for piece in (bos, "$A", eos) if piece is not None],
        special_tokens=[(text, tokens.index(text)) for text in (bos, eos) if text is not None],
    )


def _token_id(
    path: Path, metadata: Mapping[str, Any], name: str, tokens: Sequence[str]
) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or (type(value) is int and 0 <= value < len(tokens)):
        return value
    raise CheckpointError(
        f"tokenizer.ggml.{name} is {str(value)[:40]}, but there are {len(tokens)} tokens.",
        file=path,
        remedy="Fetch or convert the file again.",
    )


def _special_tokens(
    path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> SpecialTokens:
    ids = {name: _token_id(path, metadata, key, tokens) for name, key in _NAMES.items()}
    ends = {
        _token_id(path, metadata, key, tokens)
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
    }
    for token_id, (text, kind) in enumerate(
        zip(tokens, _types(path, metadata, tokens), strict=True)
    ):
        if kind == _CONTROL and text in _ENDS_OF_TURN:
            ends.add(token_id)
    return SpecialTokens(
        ids["bos_token"],
        frozenset(end for end in ends if end is not None),
        {name: tokens[value] for name, value in ids.items() if value is not None},
    )


def _chat_template(
    path: Path, metadata: Mapping[str, Any], names: Mapping[str, str]
) -> ChatTemplate | None:
    prefix = "tokenizer.chat_template"
    sources = {
        key.removeprefix(prefix).removeprefix(".") or "default": text
        for key, text in metadata.items()
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(text, str)
    }
    return ChatTemplate(sources, names, path) if sources else None
