"""Paged attention beside torch's, on one thread: the kernel is what each thread of a step runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import KVCache
from fuserve.kernels.cache import BLOCK_SIZE_TOKENS, CacheType
from fuserve.kernels.machine import selected_isa

from .measure import Call, Ceilings, Claim, Effort, Row, in_turns, num_copies, roofline_row
from .torch_peers import attention_peers

Floats = npt.NDArray[np.float32]

MODELS = {"SmolLM2 9/3 heads": (9, 3), "Llama 32/8 heads": (32, 8)}
HEAD_DIM = 64
PREFILL_TOKENS = 512
CONTEXTS = (128, 2048, 8192)
COMMITTED = 0x3C  # a byte that makes small normal numbers of both cache types


def measure_attention(effort: Effort, quick: bool) -> Iterator[Row | Claim]:
    """Prefill of a prompt, and one token at several contexts, for all types of cache."""
    effort = replace(effort, threads=1)
    ceilings = Ceilings.measure(1)
    models = list(MODELS.items())[-1:] if quick else MODELS.items()
    for model, heads in models:
        longest_s: dict[CacheType, float] = {}
        for kind in (CacheType.F16, CacheType.I8) if quick else CacheType:
            yield _measure(model, heads, kind, 0, PREFILL_TOKENS, ceilings, effort)
            for context in CONTEXTS:
                row = _measure(model, heads, kind, context - 1, 1, ceilings, effort)
                longest_s[kind] = row.seconds
                yield row
        yield Claim(
            f"attention of one token at {CONTEXTS[-1]}, int8 cache against f16, {model}",
            longest_s[CacheType.F16] / longest_s[CacheType.I8],
            1.5,
            f"{longest_s[CacheType.I8] * 1e3:.2f} ms against {longest_s[CacheType.F16] * 1e3:.2f}",
        )


def _measure(
    model: str,
    heads: tuple[int, int],
    kind: CacheType,
    first: int,
    tokens: int,
    ceilings: Ceilings,
    effort: Effort,
) -> Row:
    """``tokens`` queries from position ``first`` on, over all keys up to their own."""
    num_heads, num_kv_heads = heads
    context = first + tokens
    cache_bytes = kind.block_bytes(1, num_kv_heads, HEAD_DIM) * context // BLOCK_SIZE_TOKENS
    copies = num_copies(cache_bytes)
    rng = np.random.default_rng(context)
    q = rng.standard_normal((tokens, num_heads, HEAD_DIM), np.float32)
    k, v = (rng.standard_normal((context, num_kv_heads, HEAD_DIM), np.float32) for _ in range(2))
    ours = _our_attention(q, k, v, kind, first, copies)
    calls = {"fuserve": (ours, copies)}
    for name, peer in attention_peers(q, k, v, half=kind != CacheType.F32, copies=copies).items():
        calls[name] = (peer, copies)
    pairs = tokens * (first + first + tokens + 1) // 2  # of a query and a key it sees
    return roofline_row(
        f"attention {kind.name.lower()} cache, 1 thread",
        model,
        f"prefill {tokens}" if tokens > 1 else f"decode at {context}",
        in_turns(calls, effort),
        operations=4 * num_heads * HEAD_DIM * pairs,
        num_bytes=cache_bytes,
        arithmetic=("fp32 FMA", ceilings.fp32_op_per_s),
        read_bytes_per_s=ceilings.read_bytes_per_s,
        in_bytes=tokens == 1,
    )


def _our_attention(
    q: Floats, k: Floats, v: Floats, kind: CacheType, first: int, copies: int
) -> Call:
    """A copy is a layer of the cache."""
    isa, (tokens, num_heads, head_dim) = selected_isa(), q.shape
    num_blocks = -(-len(k) // _native.BLOCK_TOKENS)
    cache = KVCache(copies, num_blocks, k.shape[1], head_dim, int(kind))
    cache.fill(COMMITTED)
    table = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    new_k, new_v = np.ascontiguousarray(k[first:]), np.ascontiguousarray(v[first:])
    out = np.empty((tokens, num_heads, head_dim), np.float32)

    def attend(layer: int) -> None:
        _native.attention(
            isa, cache, layer, q, new_k, new_v, table, head_dim, first, 0, 0.0, None, out
        )

    return attend
