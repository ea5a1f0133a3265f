"""How a model is cut over ranks, and the packed tensors that a rank of each stage holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from math import prod

from fuserve.architectures import DecoderSpec
from fuserve.decoder.storage_plan import VECTORS, PlannedTensor
from fuserve.kernels.linear import Storage

CUT_INPUTS = ("o", "down")
"""Linears that are cut over their input features; all others are over their outputs."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks of one copy of the model: ``pipeline`` stages of ``tensor`` ranks each."""

    tensor: int
    pipeline: int

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Products:
    """Linear weights of one storage: their bytes, and how many weights they are."""

    storage: Storage
    in_floats: bool
    num_bytes: int
    num_weights: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous range of layers, as the rank that holds most of it has it.

    ``weight_bytes`` are of everything packed; ``layers`` and ``head`` what a step multiplies with.
    """

    num_layers: int
    weight_bytes: int
    layers: tuple[Products, ...]
    head: tuple[Products, ...]
    is_first: bool
    is_last: bool


def cuts_evenly(spec: DecoderSpec, tensor_ranks: int) -> bool:
    """Whether each of so many ranks gets whole heads, and KV heads alone or shared evenly."""
    attention = spec.attention
    kv_heads = attention.num_kv_heads
    return attention.num_heads % tensor_ranks == 0 and (
        kv_heads % tensor_ranks == 0 or tensor_ranks % kv_heads == 0
    )


class CutModel:
    """A model whose tensors are cut over ``ranks`` tensor-parallel ranks.

    Args:
        spec: of the model.
        plan: of the whole model.
        ranks: how many share each layer.
    """

    def __init__(self, spec: DecoderSpec, plan: Mapping[str, PlannedTensor], ranks: int) -> None:
        layers: list[list[PlannedTensor]] = [[] for _ in spec.layers]
        first: list[PlannedTensor] = []
        last: list[PlannedTensor] = []
        for whole in plan.values():
            tensor = _cut(whole, spec, ranks)
            part = tensor.name.split(".")
            if part[0] == "layers":
                layers[int(part[1])].append(tensor)
            elif part[0] in ("embedding", "position_embedding", "embedding_norm"):
                first.append(tensor)
            else:
                last.append(tensor)
        head = "embedding" if spec.tied_head else "head"
        heads = [tensor for tensor in (*first, *last) if tensor.name == head]
        self._layers = [_products(layer) for layer in layers]
        self._layer_bytes = [_bytes(layer) for layer in layers]
        self._first_bytes, self._last_bytes = _bytes(first), _bytes(last)
        self._tied_bytes = _bytes(heads) if spec.tied_head else 0
        self._head = _products(heads)

    def stages(self, num_stages: int) -> tuple[Stage, ...]:
        """Contiguous layers, balanced by bytes.

        A tied head stands on the last stage again, beside the embedding on the first.
        """
        first, last = self._first_bytes, self._last_bytes
        if num_stages > 1:
            last += self._tied_bytes
        counts = balanced(self._layer_bytes, first, last, num_stages)
        found = []
        for index, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
            is_first, is_last = index == 0, index == num_stages - 1
            ends = (first if is_first else 0) + (last if is_last else 0)
            found.append(
                Stage(
                    stop - start,
                    sum(self._layer_bytes[start:stop]) + ends,
                    _joined(chain.from_iterable(self._layers[start:stop])),
                    self._head if is_last else (),
                    is_first,
                    is_last,
                )
            )
        return tuple(found)


def _products(tensors: Iterable[PlannedTensor]) -> tuple[Products, ...]:
    return _joined(
        Products(
            tensor.storage, tensor.activations == "float", tensor.num_bytes, prod(tensor.shape)
        )
        for tensor in tensors
        if tensor.storage is not None
    )


def _joined(products: Iterable[Products]) -> tuple[Products, ...]:
    """One entry for each storage."""
    sums: dict[tuple[Storage, bool], Products] = {}
    for one in products:
        key = (one.storage, one.in_floats)
        known = sums.get(key)
        sums[key] = (
            one
            if known is None
            else replace(
                known,
                num_bytes=known.num_bytes + one.num_bytes,
                num_weights=known.num_weights + one.num_weights,
            )
        )
    return tuple(sums.values())


def balanced(layers: Sequence[int], first: int, last: int, num_stages: int) -> list[int]:
    """How many layers each stage gets, so that the heaviest stage is as light as can be.

    Args:
        layers: bytes of each layer, in order.
        first: bytes that stand before them on the first stage.
        last: bytes that stand behind them on the last stage.
        num_stages: at most as many as there are layers.
    """
    low, high = 0, first + sum(layers) + last
    while low < high:  # the least that a stage must be able to hold
        middle = (low + high) // 2
        if _filled(layers, first, last, num_stages, middle) is None:
            low = middle + 1
        else:
            high = middle
    counts = _filled(layers, first, last, num_stages, low)
    assert counts is not None, "one stage's worth of room holds everything"
    return counts


def _filled(
    layers: Sequence[int], first: int, last: int, num_stages: int, most: int
) -> list[int] | None:
    """Layers of each stage if each is filled up to ``most`` in turn; None if the last overflows."""
    counts, start, held = [], 0, first
    for stage in range(1, num_stages):
        stop = start
        while stop < len(layers) - (num_stages - stage) and (
            stop == start or held + layers[stop] <= most
        ):
            held += layers[stop]
            stop += 1
        if held > most:
            return None
        counts.append(stop - start)
        start, held = stop, 0
    if held + sum(layers[start:]) + last > most:
        return None
    return [*counts, len(layers) - start]


def _bytes(tensors: Sequence[PlannedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


def _cut(tensor: PlannedTensor, spec: DecoderSpec, ranks: int) -> PlannedTensor:
    """The part of a tensor that one of the ranks holds."""
    if ranks == 1:
        return tensor
    owner, _, field = tensor.name.rpartition(".")
    if field != "bias" and field not in VECTORS:
        owner, field = tensor.name, ""
    linear = owner.rpartition(".")[2]
    cuts_inputs = linear in CUT_INPUTS
    if field.startswith("input_") != cuts_inputs and field:
        return tensor  # a vector over the side that is not cut
    if field == "input_scale" or linear.endswith("norm") or linear == "position_embedding":
        return tensor
    shape = list(tensor.shape)
    axis = 1 if cuts_inputs and not field else 0
    shape[axis] = _share(shape[axis], _unit(tensor, linear, spec), linear, spec, ranks)
    if tensor.storage is None:
        return replace(tensor, shape=tuple(shape), num_bytes=4 * prod(shape))
    rows, cols = shape
    packed = tensor.storage.shape(rows, cols, tensor.row_group)
    return replace(tensor, shape=(rows, cols), num_bytes=int(packed.packed_bytes))


def _unit(tensor: PlannedTensor, linear: str, spec: DecoderSpec) -> int:
    """What is never cut: a head, or the features that share a scale."""
    if linear in ("q", "k", "v", "o"):
        return spec.attention.head_dim
    if linear in ("gate", "up", "down") and tensor.storage is not None:
        return max(1, tensor.storage.group_size)
    return 1


def _share(size: int, unit: int, linear: str, spec: DecoderSpec, ranks: int) -> int:
    """The largest share of a side; KV heads are held by several ranks where they are few."""
    if linear in ("k", "v"):
        ranks = min(ranks, spec.attention.num_kv_heads)
    units = -(-size // unit)
    return min(size, -(-units // ranks) * unit)
