"""Tiny random transformers models of every family, awkward in every size.

``random_model("qwen3", folder)`` gives any test (model, folder) of a variant listed in VARIANTS.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

LENGTHS = (1, 7, 33, 70)


@dataclass(frozen=True)
class Variant:
    """A family and a config that exercises one of its ways.

    Attributes:
        config_class: transformers' name of the config.
        fields: passed to it, after the sizes of ``base``.
        lengths: prompts on which transformers and we mean the same. LongRoPE in transformers
            looks at the length of each call, in fuserve at the longest that will be served.
        max_model_len: what the executors are told.
    """

    config_class: str
    base: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    max_model_len: int = 160


@dataclass(frozen=True)
class RandomModel:
    name: str
    variant: Variant
    model: Any  # transformers.PreTrainedModel in float32
    folder: Path


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TOKENS | {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WIDE = LLAMA | {
    "vocab_size": 131,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 18,
}
PHI3 = {k: v for k, v in WIDE.items() if k != "head_dim"} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
GEMMA = LLAMA | {
    "num_hidden_layers": 7,
    "head_dim": 24,
    "query_pre_attn_scalar": 19,
    "sliding_window": 20,
}
GPT2 = TOKENS | {"vocab_size": 97, "n_positions": 160, "n_embd": 40, "n_layer": 3, "n_head": 4}
OPT = TOKENS | {
    "vocab_size": 131,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "ffn_dim": 52,
    "max_position_embeddings": 160,
    "num_attention_heads": 4,
}
BLOOM = TOKENS | {"vocab_size": 97, "hidden_size": 60, "n_layer": 3, "n_head": 6}

FACTORS_9 = [1.0 + 0.3 * i for i in range(9)]
FACTORS_LONG_9 = [1.5 + 0.9 * i for i in range(9)]
LONGROPE = {
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS_9,
        "long_factor": FACTORS_LONG_9,
    },
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | parameters}


VARIANTS: dict[str, Variant] = {
    "llama": Variant("LlamaConfig", LLAMA),
    "llama-biases-tied": Variant(
        "LlamaConfig",
        WIDE,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": Variant("LlamaConfig", LLAMA, _rope("linear", factor=3.0)),
    "llama-dynamic": Variant(
        "LlamaConfig",
        LLAMA | {"max_position_embeddings": 70},
        _rope("dynamic", factor=2.0),
    ),
    "llama-yarn": Variant(
        "LlamaConfig",
        WIDE,
        _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn-mscale": Variant(
        "LlamaConfig",
        WIDE,
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.3,
            beta_fast=8.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama-llama3": Variant(
        "LlamaConfig",
        WIDE,
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": Variant("MistralConfig", LLAMA, {"sliding_window": None}),
    "mistral-window": Variant("MistralConfig", WIDE, {"sliding_window": 20}),
    "qwen2": Variant("Qwen2Config", LLAMA),
    "qwen2-window": Variant(
        "Qwen2Config",
        LLAMA,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": Variant("Qwen3Config", WIDE | {"head_dim": 24}, {"tie_word_embeddings": True}),
    "qwen3-biases": Variant("Qwen3Config", LLAMA | {"head_dim": 12}, {"attention_bias": True}),
    "gemma2": Variant("Gemma2Config", GEMMA | {"num_hidden_layers": 3}),
    "gemma2-caps": Variant(
        "Gemma2Config",
        GEMMA | {"num_hidden_layers": 3},
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "attention_bias": True},
    ),
    "gemma3": Variant("Gemma3TextConfig", GEMMA),
    "gemma3-scaled": Variant(
        "Gemma3TextConfig",
        GEMMA,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3-multimodal": Variant(
        "Gemma3Config",
        {
            "text_config": GEMMA | {"model_type": "gemma3_text"},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 96,
            "boi_token_index": 95,
            "eoi_token_index": 94,
        },
    ),
    "phi3": Variant("Phi3Config", PHI3),
    "phi3-window": Variant("Phi3Config", PHI3, {"sliding_window": 20}),
    "phi3-partial": Variant(
        "Phi3Config",
        PHI3 | {"hidden_size": 80},
        {"partial_rotary_factor": 0.6, "tie_word_embeddings": True},
    ),
    "phi3-longrope-short": Variant(
        "Phi3Config", PHI3, LONGROPE, lengths=(1, 7, 33), max_model_len=40
    ),
    "phi3-longrope-long": Variant("Phi3Config", PHI3, LONGROPE, lengths=(41, 70)),
    "ernie4_5": Variant("Ernie4_5Config", WIDE),
    "ernie4_5-biases": Variant(
        "Ernie4_5Config",
        LLAMA | {"head_dim": 12},
        {"use_bias": True, "tie_word_embeddings": False},
    ),
    "gpt2": Variant("GPT2Config", GPT2),
    "gpt2-untied": Variant(
        "GPT2Config",
        GPT2,
        {
            "n_inner": 52,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "activation_function": "gelu",
        },
    ),
    "opt": Variant("OPTConfig", OPT),
    "opt-post-norm": Variant(
        "OPTConfig", OPT, {"do_layer_norm_before": False, "enable_bias": False}
    ),
    "bloom": Variant("BloomConfig", BLOOM),
    "bloom-power-of-two": Variant(
        "BloomConfig", BLOOM | {"hidden_size": 40, "n_head": 4}, {"tie_word_embeddings": False}
    ),
}


def random_model(name: str, folder: Path, seed: int = 0, **changes: Any) -> RandomModel:
    """Build variant ``name`` with random weights and save it to ``folder`` as safetensors.

    ``changes`` replace fields of its config.
    """
    variant = VARIANTS[name]
    fields = copy.deepcopy({**variant.base, **variant.fields, **changes})  # configs edit theirs
    config = getattr(transformers, variant.config_class)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    _randomize(model, seed, norm_centre=0.0 if "gemma" in name else 1.0)
    model.save_pretrained(folder)
    return RandomModel(name, variant, model, folder)


def _randomize(model: Any, seed: int, norm_centre: float) -> None:
    """Spread out all weights, so that an ignored bias or norm shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                centre = norm_centre if name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_(noise * _spread(name, parameter))


def _spread(name: str, parameter: torch.Tensor) -> float:
    is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
    return 0.5 if is_embedding else 1.3 / min(parameter.shape) ** 0.5
