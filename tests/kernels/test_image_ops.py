"""Operations of image programs against plain float64, over sizes that fit no tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from fuserve._native import GroupNorm, ImageExecutor, ImageProgram, Norm, ThreadPool
from fuserve.kernels.linear import Storage, WeightFormat, pack_floats, packed_linear

Floats = npt.NDArray[np.float32]
NONE, SILU, GELU, QUICK_GELU, GEGLU, RELU = range(6)
BOUND = -1


def draw(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Graph:
    """A program whose values are all bound, so that each operation can be looked at."""

    def __init__(self, isa: str) -> None:
        self.program, self.isa = ImageProgram(), isa
        self.arrays: dict[int, Floats] = {}

    def given(self, array: Floats) -> int:
        index = int(self.program.add_value(*array.shape, BOUND))
        self.arrays[index] = array
        return index

    def made(self, *shape: int) -> int:
        return self.given(np.full(shape, np.nan, np.float32))

    def run(self, threads: int = 2) -> None:
        ImageExecutor(self.isa).run(self.program, ThreadPool(threads), self.arrays)


def assert_close(got: Floats, want: npt.NDArray[np.float64], tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(1.0, float(np.abs(want).max()))


def repeated(array: Floats, batch: int) -> npt.NDArray[np.float64]:
    return np.repeat(array.astype(np.float64), batch // len(array), axis=0)


def as_torch(array: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def group_norm_oracle(
    sources: Sequence[Floats], batch: int, groups: int, weight: Floats, bias: Floats, silu: bool
) -> npt.NDArray[np.float64]:
    x = np.concatenate([repeated(source, batch) for source in sources], axis=-1)
    nchw = as_torch(x).permute(0, 3, 1, 2)
    out = functional.group_norm(nchw, groups, as_torch(weight), as_torch(bias), 1e-5)
    return np.asarray((functional.silu(out) if silu else out).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("sizes", "batches", "groups", "height", "width"),
    [
        ([32], [1], 4, 1, 1),
        ([7], [3], 7, 5, 3),
        ([20, 13], [2, 1], 3, 9, 17),  # the middle group lies in both sources
        ([320, 640], [1, 2], 32, 6, 11),
    ],
)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_over_one_and_two_sources(
    isa: str,
    sizes: list[int],
    batches: list[int],
    groups: int,
    height: int,
    width: int,
    silu: bool,
) -> None:
    batch, channels = max(batches), sum(sizes)
    sources = [
        3 + 2 * draw(i, b, height, width, c)
        for i, (b, c) in enumerate(zip(batches, sizes, strict=True))
    ]
    weight, bias = draw(7, channels), draw(8, channels)
    graph = Graph(isa)
    indices = [graph.given(source) for source in sources]
    out = graph.made(batch, height, width, channels)
    graph.program.add_group_norm(out, indices, GroupNorm(groups, 1e-5, silu, weight, bias), [], 0)
    graph.run()
    want = group_norm_oracle(sources, batch, groups, weight, bias, silu)
    assert_close(graph.arrays[out], want, 3e-6)


def test_group_norm_of_values_far_from_zero(isa: str) -> None:
    source = 100 + draw(0, 1, 40, 41, 24)
    weight, bias = draw(1, 24), draw(2, 24)
    graph = Graph(isa)
    out = graph.made(*source.shape)
    graph.program.add_group_norm(
        out, [graph.given(source)], GroupNorm(8, 1e-5, False, weight, bias), [], 0
    )
    graph.run()
    want = group_norm_oracle([source], 1, 8, weight, bias, False)
    assert_close(graph.arrays[out], want, 1e-4)  # 100 standard deviations cost two digits


def test_layer_norm(isa: str) -> None:
    source, weight, bias = draw(0, 2, 1, 7, 50), draw(1, 50), draw(2, 50)
    graph = Graph(isa)
    out = graph.made(*source.shape)
    graph.program.add_layer_norm(out, graph.given(source), Norm(True, 1e-5, weight, bias))
    graph.run()
    want = functional.layer_norm(
        as_torch(source), (50,), as_torch(weight), as_torch(bias), 1e-5
    ).numpy()
    assert_close(graph.arrays[out], want, 2e-6)


ACTIVATIONS = {
    NONE: lambda x: x,
    SILU: functional.silu,
    GELU: functional.gelu,
    QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
    RELU: functional.relu,
}


def linear_weights(weight: Floats, bias: Floats | None, storage: Storage, row_group: int = 0):
    shape = storage.shape(*weight.shape, row_group)
    packed = np.full(shape.packed_bytes, 0xA5, np.uint8)
    pack_floats(shape, weight, packed, ThreadPool(1))
    padded = None
    if bias is not None:
        groups = 1 if row_group == 0 else len(bias) // row_group
        tiles = np.zeros((groups, shape.tiles * 16 // groups), np.float32)
        tiles[:, : len(bias) // groups] = bias.reshape(groups, -1)
        padded = tiles.reshape(-1)
    return packed_linear(shape, packed, padded)


@pytest.mark.parametrize("activation", [NONE, SILU, GELU, QUICK_GELU, RELU])
@pytest.mark.parametrize(
    ("batch", "given", "tokens", "cols", "rows"),
    [(1, 1, 1, 5, 3), (2, 2, 77, 48, 33), (4, 2, 9, 64, 40), (2, 1, 260, 300, 130)],
)
def test_linear_with_layer_norm_activation_and_residual(
    isa: str, activation: int, batch: int, given: int, tokens: int, cols: int, rows: int
) -> None:
    source, residual = draw(0, given, 1, tokens, cols), draw(1, 1, 1, tokens, rows)
    weight, bias = draw(2, rows, cols) / np.float32(cols**0.5), draw(3, rows)
    scale, shift = draw(4, cols), draw(5, cols)
    graph = Graph(isa)
    out = graph.made(batch, 1, tokens, rows)
    linear = linear_weights(weight, bias, Storage(WeightFormat.F32))
    norm = Norm(True, 1e-5, scale, shift)
    graph.program.add_linear(
        out, graph.given(source), linear, norm, graph.given(residual), activation
    )
    graph.run()
    x = functional.layer_norm(as_torch(source), (cols,), as_torch(scale), as_torch(shift), 1e-5)
    y = (x @ as_torch(weight).T + as_torch(bias)).repeat_interleave(batch // given, dim=0)
    want = ACTIVATIONS[activation](y + as_torch(residual))
    assert_close(graph.arrays[out], want.numpy(), 5e-6)


@pytest.mark.parametrize(("cols", "half"), [(24, 16), (33, 40), (96, 200)])
def test_geglu_multiplies_values_by_the_gelu_of_gates(isa: str, cols: int, half: int) -> None:
    source = draw(0, 2, 3, 25, cols)
    weight, bias = draw(1, 2 * half, cols) / np.float32(cols**0.5), draw(2, 2 * half)
    graph = Graph(isa)
    out = graph.made(2, 3, 25, half)
    linear = linear_weights(weight, bias, Storage(WeightFormat.F32), half)
    residual = draw(3, 1, 3, 25, 2 * half)  # as a low-rank branch adds
    graph.program.add_linear(out, graph.given(source), linear, None, graph.given(residual), GEGLU)
    graph.run()
    sums = as_torch(source) @ as_torch(weight).T + as_torch(bias) + as_torch(residual)
    values, gates = sums.chunk(2, -1)
    assert_close(graph.arrays[out], (values * functional.gelu(gates)).numpy(), 4e-6)


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [
        (Storage(WeightFormat.F16), 1e-3),
        (Storage(WeightFormat.BF16), 1e-2),
        (Storage(WeightFormat.Q8, 64), 2e-2),
        (Storage(WeightFormat.Q4_ASYMMETRIC, 32), 0.15),
    ],
    ids=lambda given: given.describe() if isinstance(given, Storage) else "",
)
def test_stacked_weights_in_every_format(isa: str, storage: Storage, tolerance: float) -> None:
    # Three matrices of 40 rows, each on tiles of its own, as queries, keys and values are.
    source, weight = draw(0, 2, 4, 8, 96), draw(1, 120, 96) / np.float32(96**0.5)
    graph = Graph(isa)
    out = graph.made(2, 4, 8, 120)
    linear = linear_weights(weight, None, storage, 40)
    graph.program.add_linear(out, graph.given(source), linear, None, BOUND, NONE)
    graph.run()
    assert_close(graph.arrays[out], source.astype(np.float64) @ weight.T, tolerance)


def attend(
    isa: str,
    query: Floats,
    key: Floats,
    value: Floats,
    heads: int,
    causal: bool,
    threads: int = 2,
    in_pairs: bool = False,
) -> Floats:
    graph = Graph(isa)
    batch = max(len(query), len(key))
    out = graph.made(batch, *query.shape[1:])
    q, k, v = (graph.given(x) for x in (query, key, value))
    graph.program.add_attention(
        out, (q, 0), (k, 0), (v, 0), heads, query.shape[-1] // heads, causal, in_pairs
    )
    graph.run(threads)
    return graph.arrays[out]


def attention_oracle(
    query: Floats, key: Floats, value: Floats, heads: int, causal: bool
) -> npt.NDArray[np.float64]:
    batch = max(len(query), len(key))

    def split(x: Floats) -> torch.Tensor:
        full = repeated(x, batch).reshape(batch, -1, heads, x.shape[-1] // heads)
        return torch.from_numpy(full).transpose(1, 2)

    out = functional.scaled_dot_product_attention(
        split(query), split(key), split(value), is_causal=causal
    )
    return np.asarray(out.transpose(1, 2).reshape(batch, *query.shape[1:]))


@pytest.mark.parametrize("head_dim", [1, 33, 40, 64, 80, 160, 512])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(1, 1, False), (70, 77, False), (530, 130, False), (77, 77, True)],
)
def test_attention_over_all_tokens(
    isa: str, head_dim: int, queries: int, keys: int, causal: bool
) -> None:
    heads = 1 if head_dim > 100 else 3
    query = draw(0, 2, 1, queries, heads * head_dim)
    key, value = (draw(i, 2, 1, keys, heads * head_dim) for i in (1, 2))
    got = attend(isa, query, key, value, heads, causal)
    assert_close(got, attention_oracle(query, key, value, heads, causal), 3e-6)


@pytest.mark.parametrize("head_dim", [1, 33, 40, 64, 160])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 77), (530, 131)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 8.0])
def test_attention_in_pairs_is_that_of_12_bits(
    isa: str, head_dim: int, queries: int, keys: int, size: float
) -> None:
    heads = 1 if head_dim > 100 else 3
    query, key, value = (
        draw(i, 2, 1, tokens, heads * head_dim) for i, tokens in enumerate((queries, keys, keys))
    )
    query *= np.float32(size)
    want = attention_oracle(query, key, value, heads, False)
    got = attend(isa, query, key, value, heads, False, in_pairs=True)
    assert np.abs(got - want).max() <= 2e-3 * max(1.0, size)  # of values that are about one
    alone = attend(
        isa, np.ascontiguousarray(query[:, :, -1:]), key, value, heads, False, 1, in_pairs=True
    )
    np.testing.assert_array_equal(alone, got[:, :, -1:])


def test_attention_in_pairs_keeps_what_many_small_weights_add(isa: str) -> None:
    """One key outweighs each of 4095 others ten thousand times, but not all of them together."""
    query, key = np.zeros((1, 1, 5, 2), np.float32), np.zeros((1, 1, 4096, 2), np.float32)
    query[..., 0], key[..., 100, 0] = 1.0, np.log(1e4) * np.sqrt(2)
    value = draw(0, 1, 1, 4096, 2) + np.float32(3)
    value[..., 100, :] = -3
    want = attention_oracle(query, key, value, 1, False)
    got = attend(isa, query, key, value, 1, False, in_pairs=True)
    np.testing.assert_allclose(got, want, rtol=2e-2)


@pytest.mark.parametrize("given", range(3))
def test_attention_in_pairs_does_not_hide_what_is_not_finite(isa: str, given: int) -> None:
    operands = [draw(i, 1, 1, 70, 24) for i in range(3)]
    operands[given][0, 0, 66, 7] = np.nan
    got = attend(isa, *operands, 1, False, in_pairs=True)  # type: ignore[misc]
    bad = np.isnan(got[0, 0]).any(-1)
    assert bad.sum() == (1 if given == 0 else 70)


@pytest.mark.parametrize("size", [5.0, 60.0])
def test_attention_with_scores_that_leave_one_key(isa: str, size: float) -> None:
    query, key, value = (draw(i, 1, 1, 200, 40) for i in range(3))
    query *= np.float32(size)
    got = attend(isa, query, key, value, 1, False)
    assert_close(got, attention_oracle(query, key, value, 1, False), 2e-6 * size)


def test_attention_of_few_queries_over_many_keys_repeats_them(isa: str) -> None:
    # One image's queries against the keys of both prompts, as at the first cross-attention.
    query, key, value = draw(0, 1, 4, 5, 32), draw(1, 2, 1, 9, 32), draw(2, 2, 1, 9, 32)
    got = attend(isa, query, key, value, 2, False)
    assert_close(got, attention_oracle(query, key, value, 2, False), 2e-6)


def test_attention_reads_heads_within_a_stacked_projection(isa: str) -> None:
    stacked = draw(0, 2, 1, 50, 3 * 24)
    graph = Graph(isa)
    source, out = graph.given(stacked), graph.made(2, 1, 50, 24)
    graph.program.add_attention(out, (source, 0), (source, 24), (source, 48), 3, 8, False, False)
    graph.run()
    parts = (np.ascontiguousarray(stacked[..., i : i + 24]) for i in (0, 24, 48))
    assert_close(graph.arrays[out], attention_oracle(*parts, 3, False), 2e-6)


def test_every_operation_gives_an_image_the_same_bits_at_any_place_and_on_any_threads(
    isa: str,
) -> None:
    images = draw(0, 5, 9, 13, 48)
    weight, bias, matrix = draw(1, 48), draw(2, 48), draw(3, 144, 48) / np.float32(7)
    linear = linear_weights(matrix, draw(4, 144), Storage(WeightFormat.F32), 48)

    def run(batch: Floats, threads: int) -> Floats:
        graph = Graph(isa)
        source = graph.given(batch)
        normed, out = graph.made(*batch.shape), graph.made(*batch.shape)
        qkv = graph.made(*batch.shape[:-1], 144)
        graph.program.add_group_norm(
            normed, [source], GroupNorm(6, 1e-5, True, weight, bias), [], 0
        )
        graph.program.add_linear(qkv, normed, linear, Norm(True, 1e-5, weight, bias), BOUND, NONE)
        graph.program.add_attention(out, (qkv, 0), (qkv, 48), (qkv, 96), 4, 12, False, False)
        graph.run(threads)
        return graph.arrays[out]

    together = run(images, 3)
    for place in range(5):
        for threads in (1, 2):
            alone = run(np.ascontiguousarray(images[place : place + 1]), threads)
            assert np.array_equal(alone[0], together[place])
    assert np.array_equal(run(np.ascontiguousarray(images[::-1]), 2)[::-1], together)


def test_operands_that_do_not_fit_are_refused(isa: str) -> None:
    graph = Graph(isa)
    small, large = graph.made(2, 3, 3, 8), graph.made(3, 3, 3, 8)
    ones = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="batch does not divide"):
        graph.program.add_group_norm(large, [small], GroupNorm(2, 1e-5, False, ones, ones), [], 0)
    with pytest.raises(ValueError, match="groups must divide"):
        GroupNorm(3, 1e-5, False, ones, ones)
    with pytest.raises(ValueError, match="no value 9"):
        graph.program.add_layer_norm(small, 9, Norm(True, 1e-5, ones, None))
    with pytest.raises(ValueError, match="too few channels"):
        graph.program.add_attention(small, (small, 0), (small, 1), (small, 0), 2, 4, False, False)
    with pytest.raises(ValueError, match="is not bound"):
        graph.program.add_value(1, 1, 1, 1, BOUND)
        graph.run()
