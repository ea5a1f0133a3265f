"""A spec as config.json would say it, for models whose checkpoint has no config.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.architectures.spec import DecoderSpec
from fuserve.errors import UnsupportedModelError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Families that can be written, and transformers' names of them."""


def huggingface_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a spec.

    Raises:
        UnsupportedModelError: the family, or its rotary scaling, cannot be written.
    """
    rope = spec.layers[0].rope
    is_plain = rope is not None and rope.scaling is None and rope.dim == spec.attention.head_dim
    if spec.family not in CLASSES or rope is None or not is_plain:
        raise UnsupportedModelError(
            f"a {spec.family} model can only be quantized from its Hugging Face folder: its GGUF "
            "file does not say all that a config.json needs"
        )
    attention, feed_forward = spec.attention, spec.feed_forward
    config = {
        "architectures": [CLASSES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": feed_forward.size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": feed_forward.activation,
        "rms_norm_eps": spec.norm.eps,
        "rope_theta": rope.base,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.tied_head,
    }
    if spec.family == "llama":
        config |= {"attention_bias": attention.output_bias, "mlp_bias": feed_forward.bias}
    return config


def separated_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """The order of rows that puts rotated pairs of neighbours half a head apart.

    GGUF stores Llama's queries and keys with neighbours rotated together; transformers rotates
    feature ``i`` with ``i + head_dim / 2``.  # [num_heads * head_dim]
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
