from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fuserve.checkpoints.tokenizer import SpecialTokens, Tokenizer

_FFFD = "\ufffd"


def _byte_fallback_tokenizer() -> Tokenizer:
    """Llama's kind of decoder: pieces with U+2581 for spaces, and a token for every byte."""
    words = ["▁hello", "▁world", "▁", "a", "b", "你", "!"]
    vocabulary = {"<s>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {word: 257 + number for number, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Tokenizer(
        backend, vocab_size=len(vocabulary), special=SpecialTokens(), chat_template=None
    )


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return _byte_fallback_tokenizer()


def _pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, **how) -> list:
    stream = tokenizer.stream(prompt or [], **how)
    return [*(stream.step(one) for one in ids), stream.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_together_are_the_decoded_text(demo_tokenizer, unicode_texts, skip):
    for text in unicode_texts:
        ids = demo_tokenizer.encode(text)
        pieces = _pieces(demo_tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == demo_tokenizer.decode(ids, skip_special_tokens=skip), text


def test_half_a_character_is_never_given_out(demo_tokenizer, spellable_texts):
    for text in spellable_texts:
        if _FFFD not in text:
            pieces = _pieces(demo_tokenizer, demo_tokenizer.encode(text))
            assert not any(_FFFD in piece for piece in pieces), text


def test_an_emoji_of_many_tokens_comes_character_by_character(demo_tokenizer):
    family = "👩‍👩‍👧‍👦"
    ids = demo_tokenizer.encode(family)
    assert len(ids) > len(family)
    pieces = _pieces(demo_tokenizer, ids)
    assert "" in pieces
    assert all(set(piece) <= set(family) for piece in pieces)
    assert "".join(pieces) == family


def test_random_tokens_stream_like_they_decode(demo_tokenizer):
    draw = random.Random(7)
    for _ in range(150):
        ids = [draw.randrange(demo_tokenizer.vocab_size) for _ in range(60)]
        assert "".join(_pieces(demo_tokenizer, ids)) == demo_tokenizer.decode(ids)


def test_an_incomplete_character_shows_only_when_flushed(demo_tokenizer):
    ids = demo_tokenizer.encode("ok 𓀀")
    stream = demo_tokenizer.stream()
    steps = [stream.step(one) for one in ids[:-1]]
    assert "".join(steps).rstrip() == "ok"
    assert stream.flush() == _FFFD
    assert stream.flush() == ""


def test_invalid_bytes_without_end_are_still_given_out_in_time(demo_tokenizer):
    (half, *_) = demo_tokenizer.encode("𓀀")
    ids = [half] * 200
    stream = demo_tokenizer.stream()
    steps = [stream.step(one) for one in ids]
    assert len("".join(steps)) > 150
    assert "".join(steps) + stream.flush() == demo_tokenizer.decode(ids)


def test_literal_replacement_characters_do_not_swallow_what_follows(demo_tokenizer):
    text = _FFFD * 40 + "你好" + _FFFD
    ids = demo_tokenizer.encode(text)
    assert "".join(_pieces(demo_tokenizer, ids)) == text


def test_a_continuation_keeps_the_space_before_its_first_word(byte_fallback):
    hello, world = 257, 258
    assert byte_fallback.decode([hello, world]) == "hello world"
    assert _pieces(byte_fallback, [world], prompt=[hello]) == [" world", ""]
    assert _pieces(byte_fallback, [world], prompt=[hello, *[0] * 50]) == [" world", ""]
    assert _pieces(byte_fallback, [hello, world]) == ["hello", " world", ""]


def test_a_start_of_nothing_but_special_tokens_and_spaces(byte_fallback):
    ids = [0, 0, 259, 0, 257, 0, 0, 258]
    assert "".join(_pieces(byte_fallback, ids)) == byte_fallback.decode(ids)


def test_byte_tokens_wait_for_the_whole_character(byte_fallback):
    ids = [257, *(byte + 1 for byte in "€".encode()), 262, 263]
    assert _pieces(byte_fallback, ids) == ["hello", "", "", "€", "你", "!", ""]


def test_special_tokens_in_the_middle_leave_no_trace(demo_tokenizer):
    ids = demo_tokenizer.encode("one <|im_end|> two <|im_end|><|im_end|>" * 30 + "你")
    assert "".join(_pieces(demo_tokenizer, ids)) == demo_tokenizer.decode(ids)


def test_a_long_answer_streams_in_linear_time(demo_tokenizer):
    text = "word 你好 👍🏽 <|im_end|>" * 400
    ids = demo_tokenizer.encode(text)
    seen: list[int] = []
    stream = demo_tokenizer.stream()
    plain = stream._decode
    stream._decode = lambda window: seen.append(len(window)) or plain(window)
    pieces = [stream.step(one) for one in ids]
    assert "".join(pieces) + stream.flush() == demo_tokenizer.decode(ids)
    assert max(seen) < 40
