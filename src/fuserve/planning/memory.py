"""Memory that a rank needs."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.architectures import DecoderSpec
from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.kernels.cache import CacheType
from fuserve.planning.layout import Stage
from fuserve.planning.workload import Workload

PROCESS_BYTES = 150_000_000
"""Python, its libraries, the tokenizer and the server, before a model is loaded."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    kv_cache: int
    activations: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations + self.process


def rank_memory(spec: DecoderSpec, stage: Stage, cache: CacheType, work: Workload) -> RankMemory:
    """What a rank of this stage takes."""
    return RankMemory(
        weights=stage.weight_bytes,
        kv_cache=num_blocks(work) * block_bytes(spec, stage, cache),
        activations=_activation_bytes(spec, stage, work),
    )


def num_blocks(work: Workload) -> int:
    """KV-cache blocks for all sequences at their full length."""
    return work.max_num_seqs * -(-work.max_model_len // BLOCK_SIZE_TOKENS)


def block_bytes(spec: DecoderSpec, stage: Stage, cache: CacheType) -> int:
    """Bytes of one block in the stage's layers, with the KV heads that one rank has."""
    return cache.block_bytes(stage.num_layers, stage.num_kv_heads, spec.attention.head_dim)


def _activation_bytes(spec: DecoderSpec, stage: Stage, work: Workload) -> int:
    """The step's workspace (``csrc/decoder/workspace.h``) and its logits, in fp32.

    Residual and branch, queries and attention, normalized and inner rows with their int8 forms.
    """
    tokens = max(work.max_num_batched_tokens, work.max_num_seqs)
    attention, inner = stage.num_heads * spec.attention.head_dim, stage.feed_forward_size
    widest = max(spec.hidden_size, attention, inner)
    floats = 2 * spec.hidden_size + 2 * attention + widest + inner
    logits = 4 * work.max_num_seqs * spec.vocab_size if stage.is_last else 0
    return tokens * (4 * floats + widest + inner) + logits
