"""How a model is cut over ranks, and the packed tensors that a rank of each stage holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from fuserve.architectures import DecoderSpec
from fuserve.decoder.model_part import FIRST_STAGE, ModelPart
from fuserve.decoder.native import cache_type
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.shard import Shard
from fuserve.decoder.slices import slices
from fuserve.decoder.storage_plan import PlannedTensor, plan_storage
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage
from fuserve.parallel.balance import balanced_stages


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

    ``weight_bytes`` are of everything packed; ``layers`` and ``head`` what a step multiplies with;
    ``num_heads``, ``num_kv_heads`` and ``feed_forward_size`` are the rank's own.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    feed_forward_size: int
    weight_bytes: int
    layers: tuple[Products, ...]
    head: tuple[Products, ...]
    is_first: bool
    is_last: bool


def cuts_evenly(spec: DecoderSpec, tensor_ranks: int) -> bool:
    """Whether each of so many ranks gets as many heads, and some of everything."""
    if spec.attention.num_heads % tensor_ranks:
        return False
    try:
        slices(spec, tensor_ranks)
    except InvalidRequestError:
        return False
    return True


class CutModel:
    """A model of which each layer is shared by ``ranks`` tensor-parallel ranks.

    Args:
        weights: of the whole model; only shapes and types are asked for.
        options: how they are held.
        ranks: how many share each layer.

    Attributes:
        cache: the type of its KV cache.
        weight_bytes: of one rank, with all layers.
    """

    def __init__(self, weights: DecoderWeights, options: ExecutorOptions, ranks: int) -> None:
        spec = weights.spec
        part = ModelPart(spec, Shard(0, ranks))  # the first rank has the larger shares
        plan, _ = plan_storage(weights, options, part)
        layers: list[list[PlannedTensor]] = [[] for _ in spec.layers]
        first: list[PlannedTensor] = []
        last: list[PlannedTensor] = []
        for tensor in plan.values():
            name = tensor.name.split(".")
            if name[0] == "layers":
                layers[int(name[1])].append(tensor)
            else:
                (first if name[0] in FIRST_STAGE else last).append(tensor)
        head = "embedding" if spec.tied_head else "head"
        heads = [tensor for tensor in (*first, *last) if tensor.name == head]
        self.cache = cache_type(options, plan)
        self.weight_bytes = _bytes(plan.values())
        self._rank = part.spec
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
        costs = list(self._layer_bytes)
        costs[0] += first
        costs[-1] += last
        found = []
        for index, layers in enumerate(balanced_stages(costs, num_stages)):
            start, stop = layers.start, layers.stop
            is_first, is_last = index == 0, index == num_stages - 1
            ends = (first if is_first else 0) + (last if is_last else 0)
            found.append(
                Stage(
                    stop - start,
                    self._rank.attention.num_heads,
                    self._rank.attention.num_kv_heads,
                    self._rank.feed_forward.size,
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


def _bytes(tensors: Iterable[PlannedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
