"""Types of the paged KV cache."""

from __future__ import annotations

from enum import IntEnum

BLOCK_SIZE_TOKENS = 32
"""Tokens in one KV-cache block."""


class CacheType(IntEnum):
    """How keys and values are stored; the numbers are those of ``csrc/attention``.

    ``I8`` and ``I4`` have an fp32 scale for each token and KV head, of its key and of its value.
    """

    F32 = 0
    F16 = 1
    I8 = 2
    I4 = 3

    def block_bytes(self, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block in all layers; head dims are padded to 16."""
        padded = -(-head_dim // 16) * 16
        token_bytes = {0: 4 * padded, 1: 2 * padded, 2: padded + 4, 3: padded // 2 + 4}[self]
        return 2 * BLOCK_SIZE_TOKENS * token_bytes * num_kv_heads * num_layers
