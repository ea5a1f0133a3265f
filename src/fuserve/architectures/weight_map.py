"""Where each canonical tensor of a spec lies in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fuserve.architectures.shapes import tensor_shapes
from fuserve.architectures.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class PerHead:
    """Part ``part`` of rows that lie as ``[num_heads, num_parts, head_dim]`` (BLOOM's QKV)."""

    num_heads: int
    num_parts: int
    part: int

    def rows(self, num_rows: int) -> npt.NDArray[np.intp]:
        """Which of the ``num_rows`` stored rows they are."""
        rows = np.arange(num_rows).reshape(self.num_heads, self.num_parts, -1)
        return rows[:, self.part].reshape(-1)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """How a canonical tensor is made from a stored one, in this order.

    Attributes:
        name: the stored tensor.
        transpose: it is stored as ``[in, out]`` (GPT-2's Conv1D).
        rows: the rows ``start, stop`` of it (stacked projections).
        per_head: the interleaved rows of it.
        add: added to every element (Gemma stores its norm weights minus one).
    """

    name: str
    rows: tuple[int, int] | None = None
    per_head: PerHead | None = None
    transpose: bool = False
    add: float = 0.0


Template = str | TensorSource
"""A stored name without ``.weight`` or ``.bias``, the layer's number written as ``{i}``."""


def map_tensors(spec: DecoderSpec, templates: Mapping[str, Template]) -> dict[str, TensorSource]:
    """Expand ``templates`` over all canonical tensors of ``spec``.

    ``templates`` has one entry for each canonical name without ``layers.{i}.`` and ``.bias``.
    """
    sources = {}
    for canonical in tensor_shapes(spec):
        layer, key = "", canonical
        if canonical.startswith("layers."):
            _, layer, key = canonical.split(".", 2)
        key, _, bias = key.partition(".")
        template = templates[key]
        source = TensorSource(template) if isinstance(template, str) else template
        name = source.name.replace("{i}", layer) + (".bias" if bias else ".weight")
        is_plain = bool(bias)  # biases are vectors: never transposed, never shifted
        sources[canonical] = replace(
            source,
            name=name,
            transpose=source.transpose and not is_plain,
            add=0.0 if is_plain else source.add,
        )
    return sources


def stacked(name: str, keys: Sequence[str], sizes: Sequence[int]) -> dict[str, Template]:
    """Templates of ``keys`` whose rows are stacked in one stored tensor ``name``."""
    templates: dict[str, Template] = {}
    start = 0
    for key, size in zip(keys, sizes, strict=True):
        templates[key] = TensorSource(name, rows=(start, start + size))
        start += size
    return templates


def stacked_qkv(name: str, spec: DecoderSpec) -> dict[str, Template]:
    """Templates of queries, keys and values stacked in this order in ``name``."""
    attention = spec.attention
    query, key = (n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads))
    return stacked(name, ("q", "k", "v"), (query, key, key))


def stored_prefix(names: Collection[str], prefixes: Sequence[str], probe: str) -> str:
    """The prefix under which ``probe`` is stored; the first where it is not stored at all.

    Checkpoints of one family differ in it, as they were saved with or without the outer module.
    """
    return next((prefix for prefix in prefixes if prefix + probe in names), prefixes[0])
