"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fuserve.checkpoints import Tokenizer
from fuserve.engine.outputs import TokenLogprobs


def chat_logprobs(
    entries: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """For chat: each token with its UTF-8 bytes and its likeliest alternatives.

    The bytes of all tokens joined are the text, also where a character is split over several.
    """

    def shown(token_id: int) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token_id)
        logprob = entry[token_id].logprob
        return {"token": _readable(spelled), "logprob": logprob, "bytes": list(spelled)}

    content = []
    for entry in entries:
        top = [shown(token_id) for token_id in _top(entry, num_top)]
        content.append({**shown(_chosen(entry)), "top_logprobs": top})
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class CompletionLogprobs:
    """For plain completions: parallel lists, with the place of each token in the text.

    Attributes:
        num_top: alternatives beside the chosen token.
        tokenizer: spells the tokens.
        offset: characters before the next token.
    """

    num_top: int
    tokenizer: Tokenizer
    offset: int = 0
    _characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), init=False
    )

    def add(
        self,
        prompt_ids: Sequence[int],
        prompt_entries: Sequence[TokenLogprobs | None],
        entries: Sequence[TokenLogprobs],
    ) -> dict[str, Any]:
        """The next tokens.

        Args:
            prompt_ids: of a prompt that is echoed; special ones are not in its text.
            prompt_entries: of these; None for the first token, which nothing predicts.
            entries: of tokens that were generated.
        """
        both = [*prompt_entries, *entries]
        ids = [*prompt_ids, *map(_chosen, entries)]
        offsets = []
        for number, token_id in enumerate(ids):
            offsets.append(self.offset)
            if number < len(prompt_ids) and token_id in self.tokenizer.special_token_ids:
                continue
            self.offset += len(self._characters.decode(self.tokenizer.token_bytes(token_id)))
        return {
            "tokens": [self._shown(token_id) for token_id in ids],
            "token_logprobs": [entry and entry[_chosen(entry)].logprob for entry in both],
            "top_logprobs": [entry and self._alternatives(entry) for entry in both],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        return {
            self._shown(token_id): entry[token_id].logprob
            for token_id in [*_top(entry, self.num_top), _chosen(entry)]
        }

    def _shown(self, token_id: int) -> str:
        spelled = self.tokenizer.token_bytes(token_id)
        text = _readable(spelled)
        return text if text.encode() == spelled else f"bytes:{text}"


def _chosen(entry: TokenLogprobs) -> int:
    return next(iter(entry))


def _top(entry: TokenLogprobs, num_top: int) -> list[int]:
    ranked = sorted(entry, key=lambda token_id: entry[token_id].rank)
    return [token_id for token_id in ranked if entry[token_id].rank <= num_top]


def _readable(spelled: bytes) -> str:
    """The bytes as text; those of a part of a character as ``\\\\xf0\\\\x9f``."""
    return spelled.decode("utf-8", "backslashreplace")
