"""Paged attention against plain float64 softmax attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve import _native
from fuserve._native import KVCache
from fuserve.kernels.cache import CacheType

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    cache: CacheType = CacheType.F32

    @property
    def padded(self) -> int:
        return -(-self.head_dim // 16) * 16

    @property
    def slopes(self) -> Floats | None:
        return np.linspace(0.5, 0.01, self.heads, dtype=np.float32) if self.alibi else None


class PagedSequence:
    """One sequence in a poisoned cache, its blocks in a shuffled order."""

    def __init__(self, isa: str, case: Case, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // 32) + 2
        self.isa, self.case = isa, case
        self.cache = KVCache(2, num_blocks, case.kv_heads, case.head_dim, int(case.cache))
        self.cache.fill(0xFF)  # every value a NaN
        order = np.random.default_rng(num_tokens).permutation(num_blocks)
        self.table = order[: num_blocks - 1].astype(np.int32)

    def attend(self, first: int, q: Floats, k: Floats, v: Floats) -> Floats:
        case = self.case

        def pad(x: Floats) -> Floats:
            width = [(0, 0), (0, 0), (0, case.padded - case.head_dim)]
            return np.ascontiguousarray(np.pad(x, width))

        out = np.full((len(q), case.heads, case.head_dim), np.nan, np.float32)
        _native.attention(
            self.isa,
            self.cache,
            1,
            pad(q),
            pad(k),
            pad(v),
            self.table,
            case.head_dim,
            first,
            case.window,
            case.softcap,
            case.slopes,
            out,
        )
        return out


def draw(case: Case, num_tokens: int) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(num_tokens)
    q = rng.standard_normal((num_tokens, case.heads, case.head_dim), dtype=np.float32)
    k, v = (
        rng.standard_normal((num_tokens, case.kv_heads, case.head_dim), dtype=np.float32)
        for _ in range(2)
    )
    return q, k, v


def reference(case: Case, q: Floats, k: Floats, v: Floats) -> npt.NDArray[np.float64]:
    repeats = case.heads // case.kv_heads
    keys, values = (np.repeat(x.astype(np.float64), repeats, axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q.astype(np.float64), keys)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    distance = np.arange(len(q))[:, None] - np.arange(len(k))[None]  # [queries, keys]
    if case.slopes is not None:
        scores = scores - case.slopes.astype(np.float64)[:, None, None] * distance
    hidden = (distance < 0) | ((distance >= case.window) if case.window else False)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, values)


def stored(kind: CacheType, x: Floats) -> Floats:
    """What the cache makes of keys or values."""
    if kind == CacheType.F16:
        return x.astype(np.float16).astype(np.float32)
    if kind in (CacheType.I8, CacheType.I4):
        highest = np.float32(127 if kind == CacheType.I8 else 7)
        scales = np.abs(x).max(axis=-1, keepdims=True) / highest
        return np.rint(x / scales) * scales
    return x


CASES = [
    Case(),
    Case(heads=7, kv_heads=7, head_dim=10),
    Case(heads=9, kv_heads=3, head_dim=64, cache=CacheType.F16),
    Case(heads=8, kv_heads=1, head_dim=18),
    Case(heads=13, kv_heads=1, head_dim=16, cache=CacheType.F16),
    Case(heads=8, kv_heads=2, head_dim=64, cache=CacheType.I8),
    Case(heads=3, kv_heads=3, head_dim=7, window=9, softcap=3.0, cache=CacheType.I8),
    Case(heads=8, kv_heads=2, head_dim=64, cache=CacheType.I4),
    Case(heads=5, kv_heads=1, head_dim=18, window=40, cache=CacheType.I4),
    Case(window=5),
    Case(window=40, cache=CacheType.F16),
    Case(softcap=2.0),
    Case(heads=3, kv_heads=3, alibi=True),
    Case(heads=6, kv_heads=2, head_dim=24, window=33, softcap=5.0, alibi=True, cache=CacheType.F16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 97])
def test_prefill_equals_plain_attention(isa: str, case: Case, num_tokens: int) -> None:
    q, k, v = draw(case, num_tokens)
    got = PagedSequence(isa, case, num_tokens).attend(0, q, k, v)
    k, v = (stored(case.cache, x) for x in (k, v))
    np.testing.assert_allclose(got, reference(case, q, k, v), rtol=2e-5, atol=2e-5)


@given(
    case=st.sampled_from(CASES),
    num_tokens=st.integers(2, 90),
    cuts=st.lists(st.integers(1, 89), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_chunks_give_the_same_bits_as_the_whole(
    case: Case, num_tokens: int, cuts: list[int]
) -> None:
    isa = _native.available_isas()[-1]
    q, k, v = draw(case, num_tokens)
    whole = PagedSequence(isa, case, num_tokens).attend(0, q, k, v)
    bounds = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    sequence = PagedSequence(isa, case, num_tokens)
    parts = [sequence.attend(a, q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    "case", [Case(), Case(window=300), Case(cache=CacheType.F16), Case(cache=CacheType.I8)], ids=str
)
def test_long_contexts_are_merged_from_splits(case: Case) -> None:
    isa = _native.available_isas()[-1]
    num_tokens = 1100  # three splits of 512
    q, k, v = draw(case, num_tokens)
    sequence = PagedSequence(isa, case, num_tokens)
    whole = sequence.attend(0, q, k, v)
    k, v = (stored(case.cache, x) for x in (k, v))
    np.testing.assert_allclose(whole, reference(case, q, k, v), rtol=5e-5, atol=5e-5)
    last = sequence.attend(num_tokens - 1, q[-1:], k[-1:], v[-1:])
    assert np.array_equal(last, whole[-1:])


def test_a_block_table_outside_the_cache_is_refused(isa: str) -> None:
    sequence = PagedSequence(isa, Case(), 40)
    sequence.table = np.array([0, 99], np.int32)
    with pytest.raises(ValueError, match="outside the cache"):
        sequence.attend(0, *draw(Case(), 40))
