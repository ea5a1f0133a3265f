"""Tiny random models to quantize, with a tokenizer, in sizes that hold whole groups."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.parity.random_models import RandomModel, random_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
GPT2_SIZES = {"n_embd": 64, "n_head": 4}
BLOOM_SIZES = {"hidden_size": 64, "n_head": 4}
OPT_SIZES = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4}
PHI3_SIZES = SIZES | {"num_key_value_heads": 2}
GEMMA_SIZES = SIZES | {"head_dim": 16}


def sized_model(name: str, folder: Path, seed: int = 0) -> RandomModel:
    """Variant ``name`` of the parity tests in sizes that hold whole groups of 32."""
    family = name.split("-")[0]
    sizes = {
        "gpt2": GPT2_SIZES,
        "bloom": BLOOM_SIZES,
        "opt": OPT_SIZES,
        "phi3": PHI3_SIZES,
        "gemma2": GEMMA_SIZES,
        "gemma3": GEMMA_SIZES,
    }.get(family, SIZES)
    model = random_model(name, folder, seed, **sizes)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for each of 90 characters."""
    characters = [chr(code) for code in range(33, 121)] + [" ", "\n"]
    vocabulary = {character: index + 3 for index, character in enumerate(characters)}
    model = models.BPE(vocab=vocabulary | {"<unk>": 0}, merges=[], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "z"}))


TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.\n"
)


def write_text(folder: Path) -> Path:
    """A text long enough for some samples of 32 tokens."""
    path = folder / "text.txt"
    path.write_text(TEXT * 8)
    return path
