"""A Llama-shaped GGUF with random weights, made from a config.json, to measure speed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

POOL_VALUES = 1 << 20  # random values that are quantized once and repeated


def write_random_gguf(
    config_path: Path, path: Path, quantization: str, tokenizer_of: Path | None = None
) -> None:
    """Write ``path`` with all matrices, the embedding too, in one block type.

    Args:
        config_path: a Hugging Face config.json of a Llama with tied embeddings.
        path: the file to write.
        quantization: a ggml type such as ``Q4_0`` or ``Q8_0``.
        tokenizer_of: a GGUF file whose tokenizer is copied; servers need one.
    """
    config = json.loads(config_path.read_text())
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _write_metadata(writer, config)
    if tokenizer_of is None:
        writer.add_tokenizer_model("none")
    else:
        _copy_tokenizer(writer, tokenizer_of)
    pool = _Pool(gguf.GGMLQuantizationType[quantization])
    hidden, size = config["hidden_size"], config["intermediate_size"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    matrices = {
        "attn_q": (q_size, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, q_size),
        "ffn_gate": (size, hidden),
        "ffn_up": (size, hidden),
        "ffn_down": (hidden, size),
    }
    pool.add_to(writer, "token_embd.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in matrices.items():
            pool.add_to(writer, f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    for name, found in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            kind, *items = found.types
            sub_type = items[-1] if items else None
            writer.add_key_value(name, found.contents(), kind, sub_type=sub_type)


class _Pool:
    """Quantized random blocks; speed does not depend on the values, so they may repeat."""

    def __init__(self, kind: gguf.GGMLQuantizationType) -> None:
        values = np.random.default_rng(0).normal(0.0, 0.02, size=(1, POOL_VALUES))
        self.kind = kind
        self.block_values, self.block_bytes = gguf.GGML_QUANT_SIZES[kind]
        self.bytes: npt.NDArray[np.uint8] = gguf.quants.quantize(
            values.astype(np.float32), kind
        ).ravel()

    def add_to(self, writer: gguf.GGUFWriter, name: str, rows: int, columns: int) -> None:
        row_bytes = columns // self.block_values * self.block_bytes
        data = np.resize(self.bytes, (rows, row_bytes))
        writer.add_tensor(name, data, raw_dtype=self.kind)
