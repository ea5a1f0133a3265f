from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.errors import CheckpointError, InvalidRequestError

_CORPUS = ["hello world, the quick brown fox 123 Größe 日本語 👍🏽\n\tdef f(x): return x"] * 3


def _byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def _sentencepiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


@pytest.fixture
def folder(write_folder, tensors) -> Path:
    return write_folder(tensors, config={"model_type": "llama", "eos_token_id": 1})


def _put(folder: Path, backend: tokenizers.Tokenizer, **settings: object) -> None:
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("build", [_byte_level, _sentencepiece])
@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}]
)
def test_a_tokenizer_json_gives_what_transformers_gives(folder, unicode_texts, build, settings):
    from transformers import AutoTokenizer

    _put(folder, build(), bos_token="<s>", eos_token="</s>", **settings)
    ours, theirs = load_tokenizer(open_checkpoint(folder)), AutoTokenizer.from_pretrained(folder)
    for text in unicode_texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            ), text
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.vocab_size == len(theirs)


def test_all_known_ends_of_a_turn_are_ends(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    _put(folder, _byte_level(), bos_token="<s>", eos_token={"content": "<|eot|>"})
    assert load_tokenizer(open_checkpoint(folder)).eos_token_ids == {1, 2}


def test_truncation_and_padding_left_in_a_tokenizer_json_are_ignored(folder):
    backend = _byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    _put(folder, backend)
    tokenizer = load_tokenizer(open_checkpoint(folder))
    text = "the quick brown fox " * 9
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_text_that_is_no_text_is_the_requests_fault(demo_tokenizer):
    with pytest.raises(InvalidRequestError, match="lone surrogate at character 2"):
        demo_tokenizer.encode("ab\ud800c")
    with pytest.raises(InvalidRequestError, match="must be text, not bytes"):
        demo_tokenizer.encode(b"ab")


def test_ids_that_are_no_tokens(demo_tokenizer):
    padded_row = demo_tokenizer.vocab_size + 5
    assert demo_tokenizer.decode([28120, padded_row]) == "hello"
    assert demo_tokenizer.token_text(padded_row) == ""
    for wrong in ([-1], [1 << 40], ["a"]):
        with pytest.raises(InvalidRequestError, match="token ids must be numbers"):
            demo_tokenizer.decode(wrong)


def test_a_missing_tokenizer_says_how_to_write_one(folder):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*AutoTokenizer.*save_pretrained"):
        load_tokenizer(open_checkpoint(folder))
