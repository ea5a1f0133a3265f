"""Refuses, at once and with a reason, requests that could never be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import CapacityError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model and its cache can hold.

    Attributes:
        vocab_size: token ids are below it.
        max_model_len: tokens of the longest sequence, prompt and output.
        cache_tokens: tokens the whole KV cache holds.
    """

    vocab_size: int
    max_model_len: int
    cache_tokens: int

    def max_len(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Tokens of prompt and output at which a request ends."""
        longest = min(self.max_model_len, self.cache_tokens)
        if params.max_tokens is None:
            return longest
        return min(longest, num_prompt_tokens + params.max_tokens)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise unless the request can be served on an idle engine.

        Raises:
            InvalidRequestError: as ``check_prompt``, also for the ids in the parameters.
            CapacityError: the model could take the prompt, but the cache is too small for it.
        """
        self.check_prompt(prompt_token_ids, room=1)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", list(params.logit_bias or ()))

    def check_prompt(self, prompt_token_ids: Sequence[int], *, room: int) -> None:
        """Raise unless the prompt and ``room`` tokens behind it fit.

        Raises:
            InvalidRequestError: the prompt is empty or too long, or an id is not in the vocabulary.
            CapacityError: the model could take the prompt, but the cache is too small for it.
        """
        num_tokens = len(prompt_token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("The prompt is empty: it must hold at least one token.")
        if num_tokens + room > self.max_model_len:
            lacks = "leaves no room for an answer in" if room else "is more than"
            raise InvalidRequestError(
                f"The prompt has {num_tokens} tokens, which {lacks} "
                f"max_model_len = {self.max_model_len}. Shorten it or raise max_model_len."
            )
        if num_tokens + room > self.cache_tokens:
            raise CapacityError(
                f"The prompt has {num_tokens} tokens, the KV cache holds {self.cache_tokens}. "
                "Shorten it or raise kv_cache_bytes."
            )
        self._check_ids("The prompt", prompt_token_ids)

    def _check_ids(self, where: str, ids: Sequence[int]) -> None:
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise InvalidRequestError(f"{where} holds {token!r}, which is no token id.")
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"{where} holds the token id {token}, but the vocabulary has ids 0 to "
                    f"{self.vocab_size - 1}."
                )
