"""Constraints over the tokenizers of every kind of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from fuserve.checkpoints.gguf_tokenizer import gguf_tokenizer
from fuserve.checkpoints.tokenizer import SpecialTokens, Tokenizer
from fuserve.engine.guided import Constraint, GuideCompiler, GuidedDecoding
from fuserve.errors import InvalidRequestError

UNK, BOS, EOS, USER = range(4)
CONTROL = ["<unk>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁hello", "▁world", "▁yes", '{"', '":', "▁▁", "▁", "ü", *'abdehlmnorstwy{}:,"']
INNER = sorted({piece[:end] for piece in PIECES for end in range(2, len(piece))})
NUM_PADDED = 7  # rows of logits that no token has

YES_OR_HELLO = GuidedDecoding("regex", "( hello| yes) world ü漢é?")
NAMED = GuidedDecoding(
    "json_schema",
    '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],'
    ' "additionalProperties": false}',
)
GOOD = [
    (YES_OR_HELLO, " hello world ü漢"),
    (YES_OR_HELLO, " yes world ü漢é"),
    (NAMED, '{"name": "hello world  é"}'),
    (NAMED, '{  "name":"ü"}'),
]
BAD = [
    (YES_OR_HELLO, " hello yes"),
    (YES_OR_HELLO, " yes world ü漢"[::-1]),
    (NAMED, '{"nome": "a"}'),
    (NAMED, '{"name": 1'),
]


def gguf_sentencepiece(architecture: str) -> Tokenizer:
    pieces = [*PIECES, *INNER]
    if architecture.startswith("gemma"):
        pieces = [piece.replace("▁", " ") if set(piece) == {"▁"} else piece for piece in pieces]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*CONTROL, *BYTES, *pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.unknown_token_id": UNK,
    }
    return gguf_tokenizer(Path("model.gguf"), metadata)


def huggingface_sentencepiece() -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate([*CONTROL, *BYTES, *PIECES, *INNER])},
            merges=[],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(backend)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["Ġh", "he", "Ġw", '{"']
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate([*CONTROL, *alphabet, *merged])},
            merges=[("Ġ", "h"), ("h", "e"), ("Ġ", "w"), ("{", '"')],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def wrapped(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    return Tokenizer(
        backend,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        special=SpecialTokens(BOS, frozenset((EOS,)), {}),
        chat_template=None,
    )


TOKENIZERS = {
    "gguf llama": lambda: gguf_sentencepiece("llama"),
    "gguf gemma2": lambda: gguf_sentencepiece("gemma2"),
    "gguf phi3": lambda: gguf_sentencepiece("phi3"),
    "sentencepiece tokenizer.json": huggingface_sentencepiece,
    "byte-level tokenizer.json": byte_level,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def allows(constraint: Constraint, token: int) -> bool:
    return bool(constraint.allowed()[token // 32] >> (token % 32) & 1)


def follows(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokens of the text, as they follow other text, are allowed to its end."""
    before = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a" + text, add_special_tokens=False)[len(before) :]
    for token in ids:
        if not allows(constraint, token):
            return False
        assert not allows(constraint, USER), "a control token inside a text"
        constraint.advance(token)
    return allows(constraint, EOS)


def test_texts_of_the_form_are_allowed_and_others_are_not(tokenizer: Tokenizer) -> None:
    compiler = GuideCompiler(tokenizer, tokenizer.vocab_size + NUM_PADDED)
    for guided, text in GOOD:
        assert follows(compiler.constraint(guided), tokenizer, text), text
    for guided, text in BAD:
        assert not follows(compiler.constraint(guided), tokenizer, text), text


def test_rows_beyond_the_vocabulary_are_never_allowed(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + NUM_PADDED
    mask = GuideCompiler(tokenizer, size).constraint(GuidedDecoding("regex", "(.|\n)*")).allowed()
    assert len(mask) == -(-size // 32)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[tokenizer.vocab_size :].any()
    assert bits.sum() > 150


def test_a_model_with_fewer_logits_than_tokens_has_a_mask_of_its_logits() -> None:
    constraint = GuideCompiler(byte_level(), 100).constraint(GuidedDecoding("regex", "a+"))
    assert len(constraint.allowed()) == 4


def test_a_tokenizer_that_nobody_knows_is_refused_when_a_constraint_comes() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    odd = Tokenizer(
        backend, vocab_size=2, special=SpecialTokens(None, frozenset((1,)), {}), chat_template=None
    )
    with pytest.raises(InvalidRequestError, match="kind of tokenizer"):
        GuideCompiler(odd, 2).check(GuidedDecoding("regex", "a"))
