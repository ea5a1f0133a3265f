from __future__ import annotations

import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.checkpoints.pre_tokenizers import PRE_TOKENIZER_KINDS
from fuserve.errors import CheckpointError, UnsupportedModelError

_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It'll RUN 12345 times!",
    "Größe naïve façade Ünïcödé résumé 日本語のテキスト 你好世界 한국어",
    "مرحبا بالعالم नमस्ते 👍🏽 👩‍👩‍👧‍👦",
    "def f(x):\n    return  x ** 2  # square\n\n\nif __name__ == 'x':\n\tprint(f(1_000))\r\n",
    "HelloWorld CamelCase camelCase ALLCAPS  2024-11-05   3.14159  100,000  ½ ² Ⅷ   spaces",
]


def _train_byte_level(kind: str) -> tokenizers.Tokenizer:
    """A small vocabulary whose merges were learned on text cut the given way."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = PRE_TOKENIZER_KINDS[kind].build()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=_CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS * 3, trainer)
    return trained


def _vocabulary(trained: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    import json

    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def _byte_level_metadata(kind: str) -> dict[str, object]:
    tokens, merges = _vocabulary(_train_byte_level(kind))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in _CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def _assert_equal_to(ours, theirs, texts) -> None:
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ids == ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            ), text


def test_the_demo_tokenizer_equals_transformers_on_odd_unicode(
    demo_tokenizer, transformers_demo_tokenizer, unicode_texts
):
    # transformers 5.23 cuts this file's text without SmolLM's rule that digits stand alone, which
    # the published tokenizer.json has (and llama.cpp follows): give it that rule first.
    theirs = transformers_demo_tokenizer
    backend = theirs.backend_tokenizer
    loaded = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    try:
        _assert_equal_to(demo_tokenizer, theirs, unicode_texts)
    finally:
        backend.pre_tokenizer = loaded


def test_the_demo_tokenizer_equals_unpatched_transformers_where_no_digit_is_cut(
    demo_tokenizer, transformers_demo_tokenizer, unicode_texts
):
    texts = [
        text
        for text in unicode_texts
        if not any(unicodedata.category(character).startswith("N") for character in text)
    ]
    assert len(texts) > 150
    _assert_equal_to(demo_tokenizer, transformers_demo_tokenizer, texts)


def test_every_text_comes_back_from_the_demo_tokenizer(demo_tokenizer, spellable_texts):
    for text in spellable_texts:
        ids = demo_tokenizer.encode(text, add_special_tokens=False)
        assert demo_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone_in_smollm(demo_tokenizer):
    texts = [demo_tokenizer.token_text(i) for i in demo_tokenizer.encode("in  2024, x²³")]
    assert texts == ["in", "  ", "2", "0", "2", "4", ",", " x", "²", "³"]


def test_special_tokens_ids_and_display(demo_tokenizer):
    assert demo_tokenizer.vocab_size == 49152
    assert demo_tokenizer.bos_token_id == 1
    assert demo_tokenizer.eos_token_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert demo_tokenizer.encode("<|im_start|>x<|im_end|>")[::2] == [1, 2]
    assert demo_tokenizer.decode([1, 28120, 2]) == "hello"
    assert demo_tokenizer.decode([1, 28120, 2], skip_special_tokens=False).startswith(
        "<|im_start|>"
    )
    assert demo_tokenizer.token_text(1) == "<|im_start|>"
    assert demo_tokenizer.token_text(demo_tokenizer.encode("a hello")[1]) == " hello"


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_kinds_equal_transformers(write_gguf, unicode_texts, kind):
    from transformers import AutoTokenizer

    path = write_gguf(metadata=_byte_level_metadata(kind))
    ours = load_tokenizer(open_checkpoint(path))
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if kind == "qwen2":  # transformers composes Unicode in Qwen2Tokenizer, but not from a GGUF
        theirs.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    _assert_equal_to(ours, theirs, unicode_texts)


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZER_KINDS))
def test_every_pre_tokenizer_kind_keeps_the_text_whole(write_gguf, unicode_texts, kind):
    ours = load_tokenizer(open_checkpoint(write_gguf(metadata=_byte_level_metadata(kind))))
    for text in unicode_texts[::7]:
        expected = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == expected


def test_a_bos_is_added_when_the_file_says_so_and_only_then(write_gguf):
    metadata = _byte_level_metadata("gpt-2")
    plain = load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))
    metadata["tokenizer.ggml.add_bos_token"] = True
    metadata["tokenizer.ggml.add_eos_token"] = True
    both = load_tokenizer(open_checkpoint(write_gguf(metadata=metadata, name="both.gguf")))
    ids = plain.encode("hello")
    assert both.encode("hello") == [1, *ids, 2]
    assert both.encode("hello", add_special_tokens=False) == ids


def test_user_defined_tokens_are_never_cut_but_are_shown(write_gguf):
    metadata = _byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["<think>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    ours = load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))
    number = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert number in ours.encode("a<think>b")
    assert ours.decode(ours.encode("a<think>b")) == "a<think>b"


def _sentencepiece_metadata(**more: object) -> dict[str, object]:
    """A Llama-style vocabulary: control tokens, 256 bytes, then pieces with their scores."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.decoder = decoders.Metaspace()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    control = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        _CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=800, special_tokens=[*control, *byte_tokens], show_progress=False
        ),
    )
    tokens, merges = _vocabulary(trained)
    ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in enumerate(merges)}
    types = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(byte_tokens, 6)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [ranks.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3"])
def test_sentencepiece_equals_transformers(write_gguf, unicode_texts, architecture):
    from transformers import AutoTokenizer

    path = write_gguf(metadata=_sentencepiece_metadata(), architecture=architecture)
    ours = load_tokenizer(open_checkpoint(path))
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _assert_equal_to(ours, theirs, unicode_texts)


def test_sentencepiece_spells_unknown_characters_as_bytes(write_gguf):
    ours = load_tokenizer(open_checkpoint(write_gguf(metadata=_sentencepiece_metadata())))
    ids = ours.encode("𓀀")
    assert ids[0] == 1  # <s>, added unless the file says otherwise
    assert ids[-4:] == [3 + byte for byte in "𓀀".encode()]
    assert ours.decode(ids) == "𓀀"


def test_no_space_is_put_before_the_text_when_the_file_forbids_it(write_gguf):
    metadata = _sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    ours = load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))
    ids = ours.encode("the dog", add_special_tokens=False)
    assert not ours.token_text(ids[0]).startswith(" ")
    assert ours.decode(ids) == "the dog"
    assert ours.decode(ours.encode(" the dog")) == " the dog"


def test_an_unknown_pre_tokenizer_is_named(write_gguf):
    metadata = _byte_level_metadata("gpt-2") | {"tokenizer.ggml.pre": "martian"}
    with pytest.raises(UnsupportedModelError, match=r"'martian' is not known.*smollm"):
        load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))


def test_an_unknown_tokenizer_model_is_named(write_gguf):
    metadata = _byte_level_metadata("gpt-2") | {"tokenizer.ggml.model": "rwkv"}
    with pytest.raises(UnsupportedModelError, match="'rwkv'"):
        load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokens", [1, 2, 3], "tokenizer.ggml.tokens"),
        ("token_type", [1, 1], "tokenizer.ggml.token_type does not have one entry"),
        ("eos_token_id", 10**6, "tokenizer.ggml.eos_token_id is 1000000"),
        ("merges", ["nospace"], "'nospace'"),
        ("merges", ["Ġ zzzzzz"], "no tokenizer can be built"),
    ],
)
def test_metadata_that_contradicts_itself_is_a_checkpoint_error(write_gguf, key, value, words):
    metadata = _byte_level_metadata("gpt-2") | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(open_checkpoint(write_gguf(metadata=metadata)))


def test_a_file_without_a_tokenizer_says_so(write_gguf):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(open_checkpoint(write_gguf()))
