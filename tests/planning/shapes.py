"""Configs that plans are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
OPT_175B: dict[str, Any] = json.loads((CONFIGS / "opt-175b.json").read_text())
BLOOM_176B: dict[str, Any] = {
    "model_type": "bloom",
    "hidden_size": 14336,
    "n_head": 112,
    "n_layer": 70,
    "vocab_size": 250880,
    "seq_length": 2048,
    "torch_dtype": "bfloat16",
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
