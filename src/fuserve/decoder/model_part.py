"""The tensors of a part of a model: which rows and columns of which canonical tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fuserve.architectures import DecoderSpec, tensor_shapes
from fuserve.decoder.shard import WHOLE_MODEL, Shard
from fuserve.decoder.slices import Slices, slices, sum_parts

Span = tuple[int, int]

FIRST_STAGE = ("embedding", "position_embedding", "embedding_norm")
LAST_STAGE = ("final_norm", "head")
PART_MARK = "@"
"""Before the number of a part in the name of a weight that is kept in several."""


@dataclass(frozen=True, slots=True)
class PartTensor:
    """A piece of a canonical tensor.

    Attributes:
        name: its name in the part; ``layers.0.down@1`` is the second of several pieces.
        source: the canonical tensor.
        shape: of the piece.
        rows: the rows ``first, stop`` it has; None is all of them.
        cols: the same of the columns.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: Span | None = None
    cols: Span | None = None


class ModelPart:
    """What one executor holds of a model.

    Args:
        spec: the whole model.
        shard: which layers, and whose slice of them.
        rank_invariant: keep output and down projections in the pieces that four ranks would have,
            so that sums over their inputs are the same tree for one, two and four ranks.

    Attributes:
        spec: a model of the part's own sizes: its layers, heads and features.
        whole: the whole model.

    Raises:
        InvalidRequestError: the model cannot be divided so.
    """

    def __init__(
        self, spec: DecoderSpec, shard: Shard = WHOLE_MODEL, rank_invariant: bool = False
    ) -> None:
        rank, size = shard.tensor_rank, shard.tensor_size
        self.whole = spec
        self.shard = shard
        self.layers = shard.layers(spec)
        self.slices: Slices = slices(spec, size)
        self.heads = self.slices.heads[rank]
        self.vocabulary = self.slices.vocabulary[rank]
        self.is_first_stage = shard.is_first_stage
        self.is_last_stage = shard.is_last_stage(spec)
        self._kv_heads = self.slices.kv_heads[rank]
        self._feed_forward = self.slices.feed_forward[rank]
        self._head_parts, self._feed_forward_parts = [self.heads], [self._feed_forward]
        if rank_invariant:
            self._head_parts, self._feed_forward_parts = sum_parts(spec, rank, size)
        self.spec = replace(
            spec,
            vocab_size=len(self.vocabulary),
            attention=replace(
                spec.attention, num_heads=len(self.heads), num_kv_heads=len(self._kv_heads)
            ),
            feed_forward=replace(spec.feed_forward, size=len(self._feed_forward)),
            layers=spec.layers[self.layers.start : self.layers.stop],
        )

    def tensors(self) -> Iterator[PartTensor]:
        """All its tensors, in the order in which they are packed."""
        for name, shape in tensor_shapes(self.whole).items():
            if not self._has(name):
                continue
            parts = self._parts_of_inputs(name)
            if parts is not None:
                for number, cols in enumerate(parts):
                    part = f"{name}{PART_MARK}{number}" if len(parts) > 1 else name
                    yield _piece(part, name, shape, None, cols)
            else:
                yield _piece(name, name, shape, self._rows_of(name), None)

    def _has(self, name: str) -> bool:
        if name.startswith("layers."):
            return int(name.split(".", 2)[1]) in self.layers
        base = name.partition(".")[0]
        is_head = base == "embedding" and self.whole.tied_head
        if base in LAST_STAGE or (is_head and not self.is_first_stage):
            return self.is_last_stage
        return self.is_first_stage

    def _rows_of(self, name: str) -> range | None:
        head_dim = self.whole.attention.head_dim
        key = name.removesuffix(".bias").rpartition(".")[2]
        if key == "q":
            return _features(self.heads, head_dim)
        if key in ("k", "v"):
            return _features(self._kv_heads, head_dim)
        if key in ("gate", "up"):
            return self._feed_forward
        return self.vocabulary if key in ("embedding", "head") else None

    def _parts_of_inputs(self, name: str) -> list[range] | None:
        if name.endswith(".o"):
            head_dim = self.whole.attention.head_dim
            return [_features(heads, head_dim) for heads in self._head_parts]
        return self._feed_forward_parts if name.endswith(".down") else None


def _features(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _piece(
    name: str, source: str, shape: tuple[int, ...], rows: range | None, cols: range | None
) -> PartTensor:
    size = list(shape)
    spans: list[Span | None] = [None, None]
    for axis, taken in ((0, rows), (1, cols)):
        if taken is not None and len(taken) != shape[axis]:
            spans[axis] = (taken.start, taken.stop)
            size[axis] = len(taken)
    return PartTensor(name, source, tuple(size), *spans)
