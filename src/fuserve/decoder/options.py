"""What a user may choose about how a decoder is held in memory and run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal[
    "int8",
    "int4",
    "llm-int8",
    "w8a8",
    "w8a8-static",
    "smoothquant",
    "smoothquant-static",
    "gptq",
    "gptq-int8",
    "awq",
    "awq-int8",
]
"""The recipes of ``fuserve.quantization``; those that need calibration cannot run on load."""
KVCacheDtype = Literal["auto", "float32", "float16", "int8", "int4"]
Activations = Literal["auto", "int8", "float"]
LoadFormat = Literal["auto", "dummy"]
ExecutorKind = Literal["native", "reference"]


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """Options of one loaded model.

    Attributes:
        dtype: type of the weights that are not quantized; "auto" keeps the checkpoint's own,
            including the grids of quantized checkpoints.
        quantization: round-to-nearest on load; None keeps the checkpoint's own grid. "int8" and
            "int4" round the weights; "w8a8" also the activations, one scale per token, and
            "llm-int8" does so but for outliers (arXiv 2208.07339).
        group_size: input features that share a scale, 32, 64 or 128; 0 is one scale per output
            channel; None takes the scheme's default.
        symmetric: int4 without zero points.
        quantize_embeddings: quantize the embedding and the head with the same scheme.
        quantize_layers: exceptions, ``PATTERN=SCHEME`` such as ``layers.1.down=int8`` or
            ``*.o=keep``; see ``fuserve.quantization.LayerChoice``.
        outlier_threshold: magnitude beyond which LLM.int8() keeps a value in float; None takes
            the scheme's, 6.0.
        activations: "int8" quantizes activations as the weights' scheme says, by default per token
            and group of 32, "float" computes in fp32; "auto" is int8 where weights are int8 or
            int4.
        rank_invariant: add up output and down projections in four fixed parts, so that one, two and
            four tensor-parallel ranks give the same bits; quantized groups and activation scales
            are then those of a part. Without it only the order of a few sums differs, and scales
            that would span a cut.
        kv_cache_dtype: "auto" is float32 for float32 weights, else float16; "int8" and "int4" have
            a scale for each token and head.
        max_model_len: tokens of the longest sequence; None takes the model's, limited by memory.
        max_num_batched_tokens: token budget of a step.
        kv_cache_bytes: memory for the KV cache; None plans it for max_num_seqs sequences.
        num_threads: None takes affinity, cgroup quota and SMT siblings into account.
    """

    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    group_size: int | None = None
    symmetric: bool = False
    quantize_embeddings: bool = False
    quantize_layers: tuple[str, ...] = ()
    outlier_threshold: float | None = None
    activations: Activations = "auto"
    rank_invariant: bool = False
    kv_cache_dtype: KVCacheDtype = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int | None = None
    num_threads: int | None = None
    load_format: LoadFormat = "auto"
    executor: ExecutorKind = "native"
    device: str = "cpu"
