"""Writes transformers models as GGUF, following llama.cpp's conversion.

Tensor names come from the gguf package's own map; the changes to the weights (permuted rows,
shifted norms, split projections) are those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.parity.random_models import RandomModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "ernie4_5": gguf.MODEL_ARCH.ERNIE4_5,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "bloom": gguf.MODEL_ARCH.BLOOM,
}


def write_gguf(
    model: RandomModel, path: Path, quantization: gguf.GGMLQuantizationType | None = None
) -> None:
    """Write ``model`` to ``path``; matrices of whole blocks are quantized if asked."""
    config = model.model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = _rope_tensors(config)
    for name, values in model.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = name.removeprefix("transformer.") if config.model_type == "bloom" else name
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = _converted(config, name, values.numpy())
    for name, values in tensors.items():
        if quantization is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    hidden = config.hidden_size
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(getattr(config, "max_position_embeddings", 160))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * hidden)
    writer.add_head_count(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    if config.model_type in ("gpt2", "bloom"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "gemma3_text":
        rope = config.rope_parameters["full_attention"]
        local = config.rope_parameters["sliding_attention"]
        writer.add_rope_freq_base_swa(local["rope_theta"])
    else:
        rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _converted(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    kind = config.model_type
    if kind in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        is_query = "q_proj" in name
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    if kind == "gpt2" and name.endswith(conv1d):
        return values.T
    if kind == "bloom" and "query_key_value" in name:
        split = values.reshape(config.n_head, 3, -1, *values.shape[1:])
        return split.swapaxes(0, 1).reshape(values.shape)
    return values


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], np.float32),
        }
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, config.head_dim)}
    return {}


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelen = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = min(max((original / wavelen - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)
