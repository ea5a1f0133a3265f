"""How text is cut before byte-level BPE, by the name that GGUF files give it.

A vocabulary's merges were learned on text cut in one certain way; the GGUF metadata only names
it (``tokenizer.ggml.pre``). The patterns are those of the families' published tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_ENGLISH_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS_SLASH_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPS_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"

_LLAMA3 = rf"{_ENGLISH_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS_AND_SPACE}"
_QWEN2 = rf"{_ENGLISH_ENDINGS}|{_WORD}|\p{{N}}|{_MARKS_AND_SPACE}"
_TEKKEN = rf"{_CAPS_WORD}|{_CAPS}|\p{{N}}|{_MARKS_SLASH_AND_SPACE}"
_GPT4O = (
    rf"{_CAPS_WORD}{_ENGLISH_ENDINGS}?|{_CAPS}{_ENGLISH_ENDINGS}?|\p{{N}}{{1,3}}"
    rf"|{_MARKS_SLASH_AND_SPACE}"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # commas and stops of many scripts


@dataclass(frozen=True, slots=True)
class PreTokenizerKind:
    """A way of cutting text.

    Attributes:
        pattern: pieces are its matches; None is GPT-2's own pattern.
        single_digits: every digit is cut off alone, before anything else.
        whole_pieces_first: a piece that is a token is taken whole, without merging.
        compose: Unicode is brought to NFC first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_pieces_first: bool = False
    compose: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, which also spells bytes in GPT-2's byte alphabet."""
        if self.pattern is not None:
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if self.single_digits:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        return gpt2


_GPT2_KIND = PreTokenizerKind()
_DIGITS_KIND = PreTokenizerKind(single_digits=True)
_LLAMA3_KIND = PreTokenizerKind(_LLAMA3, whole_pieces_first=True)
_QWEN2_KIND = PreTokenizerKind(_QWEN2)
_GPT4O_KIND = PreTokenizerKind(_GPT4O)
_BLOOM_KIND = PreTokenizerKind(_BLOOM)

PRE_TOKENIZER_KINDS: dict[str, PreTokenizerKind] = {
    "default": _GPT2_KIND,
    "gpt-2": _GPT2_KIND,
    "gpt2": _GPT2_KIND,
    "phi-2": _GPT2_KIND,
    "olmo": _GPT2_KIND,
    "mpt": _GPT2_KIND,
    "smollm": _DIGITS_KIND,
    "starcoder": _DIGITS_KIND,
    "refact": _DIGITS_KIND,
    "command-r": _DIGITS_KIND,
    "codeshell": _DIGITS_KIND,
    "exaone": _DIGITS_KIND,
    "llama-bpe": _LLAMA3_KIND,
    "llama3": _LLAMA3_KIND,
    "llama-v3": _LLAMA3_KIND,
    "falcon3": _LLAMA3_KIND,
    "dbrx": PreTokenizerKind(_LLAMA3),
    "smaug-bpe": PreTokenizerKind(_LLAMA3),
    "qwen2": PreTokenizerKind(_QWEN2, compose=True),
    "deepseek-r1-qwen": _QWEN2_KIND,
    "megrez": _QWEN2_KIND,
    "tekken": PreTokenizerKind(_TEKKEN, whole_pieces_first=True),
    "gpt-4o": _GPT4O_KIND,
    "llama4": _GPT4O_KIND,
    "bloom": _BLOOM_KIND,
    "gpt3-finnish": _BLOOM_KIND,
}
"""By the value of ``tokenizer.ggml.pre``."""
