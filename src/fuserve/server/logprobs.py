"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuserve.engine.outputs import Logprob, TokenLogprobs


def chat_logprobs(entries: Sequence[TokenLogprobs], num_top: int) -> dict[str, Any]:
    """For chat: each token with its UTF-8 bytes and its likeliest alternatives."""
    content = []
    for entry in entries:
        chosen = _chosen(entry)
        content.append(
            {**_token(chosen), "top_logprobs": [_token(t) for t in _top(entry, num_top)]}
        )
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class CompletionLogprobs:
    """For plain completions: parallel lists, with the place of each token in the text.

    Attributes:
        num_top: alternatives beside the chosen token.
        offset: characters before the next token.
    """

    num_top: int
    offset: int = 0

    def add(self, entries: Sequence[TokenLogprobs | None], texts: Sequence[str]) -> dict[str, Any]:
        """The next tokens; an entry is None for a prompt's first token, which nothing predicts.

        Args:
            entries: of the tokens.
            texts: of the tokens.
        """
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        return {
            "tokens": list(texts),
            "token_logprobs": [entry and _chosen(entry).logprob for entry in entries],
            "top_logprobs": [entry and self._alternatives(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        return {
            token.decoded_token: token.logprob
            for token in [*_top(entry, self.num_top), _chosen(entry)]
        }


def token_texts(entries: Sequence[TokenLogprobs]) -> list[str]:
    """The chosen tokens' texts."""
    return [_chosen(entry).decoded_token for entry in entries]


def _chosen(entry: TokenLogprobs) -> Logprob:
    return next(iter(entry.values()))


def _top(entry: TokenLogprobs, num_top: int) -> list[Logprob]:
    ranked = sorted(entry.values(), key=lambda token: token.rank)
    return [token for token in ranked if token.rank <= num_top]


def _token(token: Logprob) -> dict[str, Any]:
    text = token.decoded_token
    return {"token": text, "logprob": token.logprob, "bytes": list(text.encode())}
