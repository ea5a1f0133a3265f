"""How the tokens of one request are chosen, and when it ends: vLLM's names and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from fuserve.engine.guided import GuidedDecoding
from fuserve.errors import InvalidRequestError

MAX_LOGPROBS: Final = 20
MAX_CHOICES: Final = 128
GREEDY_BELOW: Final = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request, checked when made.

    Attributes:
        n: completions per prompt.
        max_tokens: tokens to generate; None goes on to the model's longest sequence.
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0 or -1 is off.
        top_p: only the most likely tokens that hold this much of the probability together.
        min_p: only tokens at least this likely relative to the most likely one.
        repetition_penalty: divides (positive) or multiplies the logits of tokens seen in prompt
            and output; 1 is off.
        presence_penalty: subtracted from the logits of tokens of the output.
        frequency_penalty: subtracted as often as the token occurs in the output.
        logit_bias: added to the logits of these token ids.
        seed: makes the request repeatable, alone or batched; None draws one.
        stop: strings that end the completion; not part of its text.
        stop_token_ids: tokens that end the completion; not part of its text.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        logprobs: number of most likely alternatives to report for each token; 0 reports only the
            token itself, None nothing. They are of the model's own distribution, before bias,
            penalties and temperature.
        prompt_logprobs: the same for the tokens of the prompt, in ``RequestOutput``.
        min_tokens: before so many are generated, neither end-of-sequence nor ``stop_token_ids``
            are chosen, and no stop string ends the completion.
        guided: what the text must look like; it ends where the constraint lets it.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string or stop token in the text.

    Raises:
        InvalidRequestError: naming the field, its value and what is allowed.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    guided: GuidedDecoding | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_float("temperature", self.temperature, 0.0, 1e6)
        _check_int("top_k", self.top_k, -1)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if not isinstance(self.guided, GuidedDecoding | None):
            raise _refusal("guided", self.guided, "a GuidedDecoding or None")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "True or False")
        _freeze(self, "stop", _stop_strings(self.stop))
        _freeze(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        _freeze(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in its checked form."""
        return _stop_strings(self.stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        """``stop_token_ids`` in its checked form."""
        return frozenset(self.stop_token_ids or ())

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Defaults a model brings in its ``generation_config.json``; absent ones stay ours.

        Raises:
            InvalidRequestError: a value of the config is out of range.
        """
        names = {field.name for field in fields(cls)} & _GENERATION_CONFIG_FIELDS
        chosen = {name: config[name] for name in sorted(names) if config.get(name) is not None}
        if config.get("max_new_tokens") is not None:
            chosen["max_tokens"] = config["max_new_tokens"]
        return cls(**chosen)


_GENERATION_CONFIG_FIELDS: Final = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
)


def _refusal(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {allowed}, got {value!r}.")


def _freeze(params: SamplingParams, name: str, value: object) -> None:
    object.__setattr__(params, name, value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < math.inf  # False for NaN


def _check_int(
    name: str, value: object, low: int, high: int | None = None, *, optional: bool = False
) -> None:
    if value is None and optional:
        return
    inside = isinstance(value, int) and value >= low and (high is None or value <= high)
    if not (_is_int(value) and inside):
        span = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise _refusal(name, value, span + (" or None" if optional else ""))


def _check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    bracket = "(" if open_low else "["
    inside = isinstance(value, int | float) and low <= value <= high
    if not _is_finite(value) or not inside or (open_low and value == low):
        raise _refusal(name, value, f"a finite number in {bracket}{low:g}, {high:g}]")


def _stop_strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise _refusal("stop", stop, "a string or a list of strings")
    if not all(isinstance(text, str) and text for text in strings):
        raise _refusal("stop", stop, "a string or a list of strings, none of them empty")
    return tuple(strings)


def _token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, Sequence) or not all(_is_int(token) and token >= 0 for token in ids):
        raise _refusal("stop_token_ids", ids, "a list of integers of at least 0")
    return tuple(ids)


def _bias(bias: object) -> Mapping[int, float]:
    if bias is None:
        return {}
    allowed = "a dict of token ids to finite numbers in [-100, 100]"
    if not isinstance(bias, Mapping):
        raise _refusal("logit_bias", bias, allowed)
    for token, value in bias.items():
        if not _is_int(token) or token < 0 or not _is_finite(value) or abs(value) > 100:
            raise _refusal("logit_bias", {token: value}, allowed)
    return dict(bias)
