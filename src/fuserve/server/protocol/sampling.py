"""Fields that chat and plain completions share, and what they mean to the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fuserve.engine.sampling_params import MAX_CHOICES, SamplingParams

MAX_STOPS = 64


class Body(BaseModel):
    """Types are strict: ``"0.5"`` is no number. NaN and infinity are none either."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class RequestBody(Body):
    """The body of a request: like OpenAI, a name that nobody knows is refused, not ignored.

    What a mistyped ``temprature`` was meant to do would else be missing without a word.
    """

    model_config = ConfigDict(extra="forbid")

    user: str | None = None  # OpenAI's, of the caller's own books


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool | None = None


class SamplingBody(RequestBody):
    """Sampling: OpenAI's fields first, then vLLM's."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)

    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true")
        return options

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} strings")
        if "" in strings:
            raise ValueError("must not be empty")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit()):
                raise ValueError(f"{token!r} is no token id")
            if abs(value) > 100:
                raise ValueError(f"the bias of token {token} must be in [-100, 100], got {value}")
        return bias

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted piece by piece."""
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, defaults: SamplingParams, **chosen: Any) -> SamplingParams:
        """``SamplingParams`` of these fields.

        Args:
            defaults: the model's own, for fields that are not given.
            chosen: what takes precedence over both.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in _SAME_NAME}
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(defaults, **{**given, **chosen})


_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
