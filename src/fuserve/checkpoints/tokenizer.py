"""Text to token ids and back, for one model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

from fuserve.checkpoints.chat_template import ChatTemplate
from fuserve.checkpoints.decode_stream import DecodeStream
from fuserve.errors import InvalidRequestError

_MAX_TOKEN_ID = (1 << 32) - 1
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of vocabularies that fall back to bytes


def _letters_of_bytes() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: as themselves, or as letters from U+0100 on.

    Source: bytes_to_unicode of GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _letters_of_bytes()


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning, and the names under which chat templates know them."""

    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"


class Tokenizer:
    """A model's tokenizer, with its chat template.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id: the token that starts a text, None if the model has none.
        eos_token_ids: all tokens that end a turn or a text.
        special_names: texts of special tokens by the names that chat templates know.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        special: SpecialTokens,
        chat_template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self.vocab_size = vocab_size
        self.bos_token_id = special.bos_token_id
        self.eos_token_ids = special.eos_token_ids
        self.special_names = special.names

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can be used."""
        return self._chat_template is not None

    @property
    def chat_template_source(self) -> str:
        """The text of the template that is used with tools; "" without a template."""
        return "" if self._chat_template is None else self._chat_template.source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; special tokens written out in it count as such.

        Pass ``add_special_tokens=False`` for text from ``apply_chat_template``: the template has
        written them already.

        Raises:
            InvalidRequestError: it is no text, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"a prompt must be text, not {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text holds a lone surrogate at character {error.start}, which is not Unicode "
                "text. Decode it from its source as UTF-8 or UTF-16."
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are no character show as U+FFFD.

        Ids beyond the vocabulary (models pad their output rows) stand for no text.

        Raises:
            InvalidRequestError: an id is negative or no 32-bit number.
        """
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidRequestError(
                f"token ids must be numbers from 0 to {_MAX_TOKEN_ID}."
            ) from error
        return text

    def token_text(self, token_id: int) -> str:
        """One token as it looks inside a text, with its leading space; for display."""
        before = self._backend.decode(self._anchor, skip_special_tokens=False)
        both = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token's text; of a split character it has only some."""
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        name: str = self._backend.id_to_token(token_id) or ""
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if all(letter in _BYTE_OF_LETTER for letter in name):
            return bytes(_BYTE_OF_LETTER[letter] for letter in name)
        return text.encode()

    def tokenizer_json(self) -> str:
        """The tokenizer as a ``tokenizer.json``, added and special tokens included."""
        text: str = self._backend.to_str()
        return text

    def stream(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DecodeStream:
        """Decodes what follows the prompt, token by token, in whole characters."""

        def decode(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)

        return DecodeStream(decode, prompt_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt for chat messages; encode it with ``add_special_tokens=False``.

        Raises:
            InvalidRequestError: the model has no template, or it refuses the messages.
            CheckpointError: the template is damaged.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "The model has no chat template. Send a plain prompt, or use an instruct model."
            )
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_args
        )

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that stand for no text, such as the beginning of one."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def special_token_id(self, text: str) -> int | None:
        """The special token that is written so; None if the model has none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    @cached_property
    def _anchor(self) -> list[int]:
        """An ordinary token to stand before another, since decoders trim the start of a text."""
        ids: list[int] = self._backend.encode("a", add_special_tokens=False).ids
        return ids
