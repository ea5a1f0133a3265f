"""Guided decoding: what an answer must look like, compiled by llguidance into masks over tokens.

It fails closed. What llguidance cannot enforce is refused when the request comes; what goes wrong
later ends the request with an error. There is never an unconstrained answer.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from fuserve.engine.text_codec import TextCodec
from fuserve.errors import InvalidRequestError, MissingExtraError, RequestFailedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GuideKind = Literal["json_object", "json_schema", "regex", "grammar", "lark", "choice"]

_KINDS: Final = get_args(GuideKind)
_MAX_CACHED: Final = 64
_MAX_SPEC_CHARS: Final = 1 << 20
_WHITESPACE: Final = r"[ \n\r\t]{1,32}"
"""Between JSON's tokens. Without a bound a small model may write blanks until its length limit."""


@dataclass(frozen=True, slots=True)
class GuidedDecoding:
    """A constraint on the text of an answer. Data only; ``GuideCompiler`` compiles it.

    Attributes:
        kind: what ``spec`` is.
        spec: the JSON text of a schema ("json_schema"), a regular expression of the whole answer
            ("regex"), a Lark or GBNF grammar ("grammar"), one in Lark whatever it looks like
            ("lark"), a JSON list of strings ("choice"); not read for "json_object".

    Raises:
        InvalidRequestError: the kind is unknown, or the spec no text or too long.
    """

    kind: GuideKind
    spec: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidRequestError(f"guided.kind must be one of {_KINDS}, got {self.kind!r}.")
        if not isinstance(self.spec, str):
            raise InvalidRequestError(f"guided.spec must be text, got {type(self.spec).__name__}.")
        if len(self.spec) > _MAX_SPEC_CHARS:
            raise InvalidRequestError(
                f"guided.spec has {len(self.spec)} characters, more than {_MAX_SPEC_CHARS}."
            )


class GuideCompiler:
    """Compiles constraints for one model's tokenizer, and keeps the latest compiled ones.

    Any thread may call it; a grammar is compiled in the caller's thread. The tokenizer is taken
    over by llguidance once, when the first constraint comes (some tenths of a second).

    Args:
        codec: the model's tokenizer; None (a model without one) refuses every constraint.
        vocab_size: logits of a row.
    """

    def __init__(self, codec: TextCodec | None, vocab_size: int) -> None:
        self._codec = codec
        self._num_words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GuidedDecoding, LLMatcher] = OrderedDict()  # oldest use first

    def check(self, guided: GuidedDecoding) -> None:
        """Compile a constraint and keep it for ``constraint``.

        Raises:
            InvalidRequestError: naming the keyword or the place that cannot be enforced.
        """
        self._matcher(guided)

    def constraint(self, guided: GuidedDecoding) -> Constraint:
        """The constraint at its beginning, for one completion.

        Raises:
            InvalidRequestError: as ``check``.
        """
        return Constraint(self._matcher(guided).deep_copy(), self._num_words)

    def _matcher(self, guided: GuidedDecoding) -> LLMatcher:
        with self._lock:
            matcher = self._compiled.get(guided)
            if matcher is not None:
                self._compiled.move_to_end(guided)
                return matcher
            tokenizer = self._own_tokenizer()
        matcher = _compile(guided, tokenizer)
        with self._lock:
            self._compiled[guided] = matcher
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def _own_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        if self._codec is None or not self._codec.eos_token_ids:
            raise InvalidRequestError(
                "Guided decoding needs a tokenizer with an end-of-sequence token; this model has "
                "none."
            )
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise MissingExtraError("llguidance", "guided", "Guided decoding") from error
        try:
            self._tokenizer = LLTokenizer(
                self._codec.tokenizer_json(),
                n_vocab=max(self._vocab_size, self._codec.vocab_size),
                eos_token=sorted(self._codec.eos_token_ids),
            )
        except Exception as error:  # llguidance raises bare ValueError, and pyo3's panics
            raise InvalidRequestError(
                f"Guided decoding does not know this model's kind of tokenizer: {error}"
            ) from error
        return self._tokenizer


class Constraint:
    """Where one completion is in its grammar.

    Args:
        matcher: at the beginning, nobody else's.
        num_words: 32-bit words of a mask.
    """

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def allowed(self) -> npt.NDArray[np.int32]:
        """The tokens that may follow, a bit each, the lowest first  # [words]

        End-of-sequence tokens are among them only where the grammar is satisfied.

        Raises:
            RequestFailedError: the grammar became too complex, or the matcher failed.
        """
        try:
            mask = self._matcher.compute_bitmask()
        except Exception as error:
            raise _failure(str(error)) from error
        self._check()
        return np.frombuffer(mask, dtype=np.int32)[: self._num_words]

    def advance(self, token: int) -> None:
        """Go on by a token.

        Raises:
            RequestFailedError: the grammar does not allow it.
        """
        if not self._matcher.consume_token(token):
            raise _failure(self._matcher.get_error())

    def forced(self) -> list[int]:
        """Tokens that the grammar most likely leads to next, as it forces their text."""
        return list(self._matcher.compute_ff_tokens())

    def num_valid(self, tokens: list[int]) -> int:
        """How many of the tokens, from the first on, the grammar allows one after the other."""
        return int(self._matcher.validate_tokens(tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _failure(self._matcher.get_error())


def _failure(reason: str) -> RequestFailedError:
    first_line = reason.strip().split("\n", 1)[0]
    return RequestFailedError(f"The constraint on the answer could not be kept up: {first_line}")


def _compile(guided: GuidedDecoding, tokenizer: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, _grammar(guided), log_level=0)
    problems = matcher.get_error() if matcher.is_error() else ""
    # A grammar can ask for leniency; what is then left out is told as a warning only.
    problems = problems or "; ".join(matcher.get_grammar_warnings())
    if problems:
        raise _refusal(guided, problems)
    return matcher


def _grammar(guided: GuidedDecoding) -> str:
    """The constraint in llguidance's own language."""
    try:
        return _translated(guided)
    except InvalidRequestError:
        raise
    except Exception as error:  # the converters raise several kinds, also for half characters
        raise _refusal(guided, str(error)) from error


def _translated(guided: GuidedDecoding) -> str:
    from llguidance import LLMatcher, grammar_from

    if guided.kind in ("json_object", "json_schema"):
        schema = '{"type": "object"}' if guided.kind == "json_object" else _checked_schema(guided)
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITESPACE}
        )
    if guided.kind == "choice":
        literals = [json.dumps(choice, ensure_ascii=False) for choice in _choices(guided)]
        return LLMatcher.grammar_from_lark("start: " + " | ".join(literals))
    if guided.kind == "regex":
        return LLMatcher.grammar_from_regex(guided.spec)
    if guided.kind == "lark":
        return LLMatcher.grammar_from_lark(guided.spec)
    return grammar_from("grammar", guided.spec)


def _checked_schema(guided: GuidedDecoding) -> str:
    schema = _parsed(guided)
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise _refusal(guided, 'the keyword "x-guidance" is not allowed')
    return guided.spec


def _choices(guided: GuidedDecoding) -> list[str]:
    choices = _parsed(guided)
    if not isinstance(choices, list) or not choices:
        raise _refusal(guided, "expected a JSON list of at least one string")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise _refusal(guided, f"every choice must be a string, not empty, got {choice!r}")
    return choices


def _parsed(guided: GuidedDecoding) -> Any:
    try:
        return json.loads(guided.spec)
    except (ValueError, RecursionError) as error:
        raise _refusal(guided, f"is not JSON: {error}") from error


def _refusal(guided: GuidedDecoding, reason: str) -> InvalidRequestError:
    noun = {
        "json_schema": "JSON schema",
        "json_object": "JSON object",
        "regex": "regular expression",
        "lark": "grammar",
    }
    name = noun.get(guided.kind, guided.kind)
    return InvalidRequestError(f"The {name} of guided decoding cannot be enforced: {reason}")
