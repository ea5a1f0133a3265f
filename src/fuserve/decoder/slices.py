"""How the sizes of a model are divided among tensor-parallel ranks.

Every division is by recursive halves, so that two ranks hold what four hold in pairs: sums over
parts can then be the same tree for one, two and four ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.architectures import DecoderSpec
from fuserve.errors import InvalidRequestError

FEED_FORWARD_UNIT = 128
"""Features that a cut of the feed-forward half is a multiple of: the largest quantization group."""

TILE_ROWS = 16
"""Rows of a packed tile, which vocabulary and small feed-forward halves are cut at."""

SUM_PARTS = 4
"""Parts that the inputs of output and down projections are cut into where one, two and four ranks
shall add in the same order."""


@dataclass(frozen=True, slots=True)
class Slices:
    """What each of some ranks has, in whole units of the model; the lists are by rank."""

    heads: list[range]
    kv_heads: list[range]
    feed_forward: list[range]
    vocabulary: list[range]


def slices(spec: DecoderSpec, num_ranks: int) -> Slices:
    """The slices of all ranks.

    KV heads are divided with the query heads that share them; where there are fewer than ranks,
    several ranks hold the same KV head, each with some of its query heads. Shares of a size that
    does not divide evenly differ by one unit: a group of heads, 128 features, 16 rows.

    Raises:
        InvalidRequestError: a rank would have nothing of some size.
    """
    attention, size = spec.attention, spec.feed_forward.size
    pairs = _split_heads(
        range(attention.num_kv_heads), attention.num_heads // attention.num_kv_heads, num_ranks
    )
    found = Slices(
        [heads for heads, _ in pairs],
        [kv_heads for _, kv_heads in pairs],
        _split_features(size, _feed_forward_unit(size), num_ranks),
        _split_features(spec.vocab_size, TILE_ROWS, num_ranks),
    )
    _check("num_heads", attention.num_heads, attention.num_heads, found.heads)
    _check("the feed-forward size", size, -(-size // _feed_forward_unit(size)), found.feed_forward)
    _check("vocab_size", spec.vocab_size, -(-spec.vocab_size // TILE_ROWS), found.vocabulary)
    return found


def sum_parts(spec: DecoderSpec, rank: int, num_ranks: int) -> tuple[list[range], list[range]]:
    """A rank's parts of the ``SUM_PARTS`` of heads and feed-forward features; none is empty.

    Raises:
        InvalidRequestError: the ranks do not divide ``SUM_PARTS``.
    """
    if SUM_PARTS % num_ranks:
        raise InvalidRequestError(
            f"rank_invariant gives the same bits for 1, 2 and 4 tensor-parallel ranks, not for "
            f"{num_ranks}"
        )
    attention, size = spec.attention, spec.feed_forward.size
    group = attention.num_heads // attention.num_kv_heads
    per_rank = SUM_PARTS // num_ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    heads = [part for part, _ in _split_heads(range(attention.num_kv_heads), group, SUM_PARTS)]
    features = _split_features(size, _feed_forward_unit(size), SUM_PARTS)
    return [h for h in heads[mine] if h], [f for f in features[mine] if f]


def split(units: range, num: int) -> list[range]:
    """``num`` consecutive ranges, the larger ones first; empty ones where there are fewer units."""
    if num == 1:
        return [units]
    left = (num + 1) // 2
    first, second = _cut(units, left, num)
    return [*split(first, left), *split(second, num - left)]


def _split_heads(kv_heads: range, group: int, num: int) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each rank; ``group`` query heads share a KV head."""
    heads = range(kv_heads.start * group, kv_heads.stop * group)
    if num == 1 or len(kv_heads) == 1:
        return [(part, kv_heads) for part in split(heads, num)]
    left = (num + 1) // 2
    first, second = _cut(kv_heads, left, num)
    return [*_split_heads(first, group, left), *_split_heads(second, group, num - left)]


def _cut(units: range, left: int, num: int) -> tuple[range, range]:
    """Units of the first ``left`` of ``num`` ranks and of the others, who get some if they can."""
    share = -(-len(units) * left // num)
    if len(units) > 1:
        share = min(share, len(units) - 1)
    cut = units.start + share
    return range(units.start, cut), range(cut, units.stop)


def _feed_forward_unit(size: int) -> int:
    return FEED_FORWARD_UNIT if size >= SUM_PARTS * FEED_FORWARD_UNIT else TILE_ROWS


def _split_features(size: int, unit: int, num: int) -> list[range]:
    units = split(range(-(-size // unit)), num)
    return [range(min(one.start * unit, size), min(one.stop * unit, size)) for one in units]


def _check(dimension: str, size: int, most: int, parts: list[range]) -> None:
    if all(parts):
        return
    raise InvalidRequestError(
        f"{len(parts)} tensor-parallel ranks are too many for {dimension} {size}, which makes at "
        f"most {most} shares; choose a tensor-parallel size of at most {most}"
    )
