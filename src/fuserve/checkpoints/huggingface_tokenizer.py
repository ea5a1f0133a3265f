"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from fuserve.checkpoints.chat_template import ChatTemplate
from fuserve.checkpoints.json_file import MAX_JSON_BYTES, read_json_object_if_there
from fuserve.checkpoints.tokenizer import SpecialTokens, Tokenizer
from fuserve.errors import CheckpointError

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def huggingface_tokenizer(
    folder: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Which tokens are put around a text is for tokenizer.json to say; as in transformers,
    ``add_bos_token`` in tokenizer_config.json only matters where there is no tokenizer.json.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    backend = read_backend(folder / "tokenizer.json")
    settings = read_json_object_if_there(folder / "tokenizer_config.json")
    if "chat_template" not in settings and "bos_token" not in settings:
        settings = {**read_json_object_if_there(folder / "special_tokens_map.json"), **settings}
    names = {name: text for name in _NAMES if (text := _text(settings.get(name))) is not None}
    special = _special_tokens(backend, names, (config, generation_config))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return Tokenizer(
        backend,
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        special=special,
        chat_template=_chat_template(folder, settings, names),
    )


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer.json, without truncation and padding. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(
            "the tokenizer is missing.",
            file=path,
            remedy='Fetch it, or write it with: python -c "from transformers import AutoTokenizer '
            f"as T; T.from_pretrained('{path.parent}').save_pretrained('{path.parent}')\"",
        )
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"is larger than {MAX_JSON_BYTES >> 20} MiB.", file=path)
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"is not a tokenizer that can be read ({error}).",
            file=path,
            remedy="Fetch the file again.",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _text(token: Any) -> str | None:
    """A special token is written as its text or as a description with its text."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(
    backend: tokenizers.Tokenizer,
    names: Mapping[str, str],
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> SpecialTokens:
    ends = {number for config in configs for number in _ids(config.get("eos_token_id"))}
    if (eos := backend.token_to_id(names.get("eos_token", ""))) is not None:
        ends.add(eos)
    bos = backend.token_to_id(names.get("bos_token", ""))
    if bos is None:
        bos = next(_ids(configs[0].get("bos_token_id")), None)
    return SpecialTokens(bos, frozenset(ends), names)


def _ids(value: Any) -> Iterator[int]:
    """Configs give one id, a list of them, or null."""
    for one in value if isinstance(value, list) else [value]:
        if type(one) is int and one >= 0:
            yield one


def _chat_template(
    folder: Path, settings: Mapping[str, Any], names: Mapping[str, str]
) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            sources = {"default": file.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read ({error}).", file=file) from error
        return ChatTemplate(sources, names, file)
    sources = dict(_named_templates(settings.get("chat_template")))
    return ChatTemplate(sources, names, folder / "tokenizer_config.json") if sources else None


def _named_templates(value: Any) -> Iterator[tuple[str, str]]:
    """The entry is one template, or a list of ``{"name": …, "template": …}``."""
    if isinstance(value, str):
        yield "default", value
    for one in value if isinstance(value, list) else ():
        if isinstance(one, Mapping):
            name, template = one.get("name"), one.get("template")
            if isinstance(name, str) and isinstance(template, str):
                yield name, template
