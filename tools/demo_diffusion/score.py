"""Whether a picture shows what its caption says, by classical image analysis.

Objects are the connected regions that differ from the picture's border. Each one's colour is the
nearest of the palette, its size that of its box, its shape the one whose outline in that box
overlaps it best. A picture is right if it holds as many objects as the caption names, with the
colours, shapes, sizes, relation and background that it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.demo_diffusion import scenes

_CONTRAST = 60.0  # distance of RGB, of 255: less belongs to the background
_MIN_AREA = 12  # pixels: less is a speck
_MIN_OVERLAP = 0.7  # intersection over union with the shape, else it has no shape
_RADIUS_BOUNDS = (8.25, 11.0)  # between small, unsaid and large


@dataclass(frozen=True, slots=True)
class Seen:
    """An object found in a picture; ``shape`` None if it has none of the known ones."""

    colour: str
    shape: str | None
    size: str | None
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a caption a picture shows rightly."""

    count: bool
    colours: bool
    shapes: bool
    relation: bool
    sizes: bool
    background: bool

    @property
    def content(self) -> bool:
        """Colours, shapes and relation: what the demo model is measured by."""
        return self.count and self.colours and self.shapes and self.relation

    @property
    def whole(self) -> bool:
        """And also the sizes and the background that the caption names."""
        return self.content and self.sizes and self.background


def judge(picture: NDArray[np.uint8], caption: scenes.Caption) -> Verdict:
    """Compare a picture, [64, 64, 3], with its caption."""
    background, seen = look(picture)
    backdrop = caption.background in (None, background)
    if len(seen) != len(caption.items):
        return Verdict(False, False, False, False, False, backdrop)
    related = True
    if caption.relation is not None:
        right, down = scenes.RELATIONS[caption.relation]
        axis = (lambda each: each.x * right) if right else (lambda each: each.y * down)
        seen = sorted(seen, key=axis, reverse=True)  # as the caption names them
        across, along = abs(seen[0].x - seen[1].x), abs(seen[0].y - seen[1].y)
        related = across > along if right else along > across
    pairs = list(zip(seen, caption.items, strict=True))
    return Verdict(
        True,
        all(each.colour == item.colour for each, item in pairs),
        all(each.shape == item.shape for each, item in pairs),
        related,
        all(item.size in (None, each.size) for each, item in pairs),
        backdrop,
    )


def share(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of the verdicts that are right in each respect."""
    names = ("content", "whole", "count", "colours", "shapes", "relation", "sizes", "background")
    return {name: float(np.mean([getattr(each, name) for each in verdicts])) for name in names}


def look(picture: NDArray[np.uint8]) -> tuple[str, list[Seen]]:
    """The background's name and the objects of a picture, [64, 64, 3]."""
    image = picture.astype(np.float32)
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)])
    rows = np.median(np.concatenate([image[:, :2], image[:, -2:]], 1), axis=1)  # [h, 3]
    away = np.linalg.norm(image - rows[:, None], axis=2)
    name = _nearest(np.median(border, axis=0), scenes.BACKGROUNDS)
    regions = _regions(away > _CONTRAST)
    return name, [_seen(image, away, region) for region in regions if region.sum() >= _MIN_AREA]


def _seen(image: NDArray[np.float32], away: NDArray[np.float32], region: NDArray[np.bool_]) -> Seen:
    inner = region & (away > 0.8 * np.percentile(away[region], 80))
    rgb = np.median(image[inner], axis=0)
    # How far a pixel is on the way from the background to the object's colour is its coverage.
    alpha = np.clip(away / np.median(away[inner]), 0, 1) * _grown(region)
    left, right = _extent(alpha.max(axis=0))
    top, bottom = _extent(alpha.max(axis=1))
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4
    size = np.searchsorted(_RADIUS_BOUNDS, radius)
    return Seen(
        _nearest(rgb, scenes.COLOURS),
        _shape(alpha, x, y, radius),
        ("small", None, "large")[size],
        x,
        y,
    )


def _shape(alpha: NDArray[np.float32], x: float, y: float, radius: float) -> str | None:
    """The best overlapping shape, if any overlaps well."""
    down, across = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]].astype(np.float32) + 0.5
    overlaps = {}
    for shape in scenes.SHAPES:
        distance = scenes.outline(shape, (across - x) / radius, (down - y) / radius)
        model = np.clip(0.5 - distance * radius, 0, 1)
        overlaps[shape] = np.minimum(alpha, model).sum() / np.maximum(alpha, model).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= _MIN_OVERLAP else None


def _extent(profile: NDArray[np.float32]) -> tuple[float, float]:
    """Where a profile of coverage begins and ends, in parts of pixels."""
    inside = np.flatnonzero(profile > 0.5)
    first, last = inside[0], inside[-1]
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return float(first + 1 - profile[first] - before), float(last + profile[last] + after)


def _nearest(rgb: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(rgb - palette[name])))


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected regions of a mask."""
    left, regions = mask.copy(), []
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = _grown(region) & mask
            if (grown == region).all():
                break
            region = grown
        regions.append(region)
        left &= ~region
    return regions


def _grown(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = region.copy()
    grown[1:] |= region[:-1]
    grown[:-1] |= region[1:]
    grown[:, 1:] |= region[:, :-1]
    grown[:, :-1] |= region[:, 1:]
    return grown
