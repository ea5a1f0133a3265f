"""Synthetic captioned scenes: what they hold, how they are told and how they are painted.

A scene holds one object, or two that stand in a relation: "a small red circle above a blue square
on a black background". The background is white where a caption leaves it out; where exactly an
object stands, how large and of which shade it is, is drawn at random, so a caption has many
pictures. Captions held out from training are those of objects that never meet in it (and of two
objects that never occur in it at all).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64  # pixels, both ways

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 60),
    "green": (45, 165, 70),
    "blue": (45, 85, 215),
    "purple": (150, 60, 190),
}
BACKGROUNDS = {"white": (240, 240, 240), "gray": (135, 135, 135), "black": (22, 22, 22)}
BACKGROUND = "white"  # where a caption names none
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": (6.5, 7.5), None: (9.0, 10.25), "large": (11.75, 13.0)}  # pixels; None: not said
RELATIONS = {  # the first object's direction from the second: (right, down)
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
NEVER_SEEN = {("purple", "triangle"), ("green", "cross")}  # objects kept out of training

_HELD_OUT_SHARE = 0.15  # of the pairs of objects
_SINGLE_SHARE = 0.25  # of the scenes
_SIZE_SHARE = 0.4  # of the objects
_BACKGROUND_SHARE = 0.5  # of the captions
_COLOUR_JITTER = 8  # of 255
_GRADIENT = 12  # of 255, from the middle of the background to its upper and lower edge
_CROSS_ARM = 0.36  # half an arm's width, of the radius


@dataclass(frozen=True, slots=True)
class Item:
    """An object as a caption tells it; ``size`` None is not told."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True, slots=True)
class Caption:
    """One object, or two with the relation of the first to the second."""

    items: tuple[Item, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        text = f" {self.relation} ".join(map(str, self.items))
        return f"{text} on a {self.background} background" if self.background else text

    @property
    def objects(self) -> list[tuple[str, str]]:
        """(colour, shape) of each object."""
        return [(item.colour, item.shape) for item in self.items]

    @property
    def never_seen(self) -> bool:
        """Whether it names an object that training never shows."""
        return any(each in NEVER_SEEN for each in self.objects)

    @property
    def held_out(self) -> bool:
        """Whether training may not show it: its objects never meet there."""
        if self.never_seen:
            return True
        if len(self.items) < 2:
            return False
        name = " ".join(f"{colour} {shape}" for colour, shape in sorted(self.objects))
        return hashlib.sha256(name.encode()).digest()[0] < 256 * _HELD_OUT_SHARE


@dataclass(frozen=True, slots=True)
class Placed:
    """A painted object: its centre and radius in pixels (its box is 2 radii wide and high)."""

    shape: str
    rgb: tuple[float, float, float]  # of 255
    x: float
    y: float
    radius: float


def captions(rng: np.random.Generator, held_out: bool = False) -> Iterator[Caption]:
    """Random captions without end: of training, or only those held out from it.

    Held-out ones name two objects that training has shown, though never together.
    """
    while True:
        caption = _random_caption(rng)
        if caption.held_out == held_out and not (held_out and caption.never_seen):
            yield caption


def never_seen_captions(rng: np.random.Generator) -> Iterator[Caption]:
    """Random captions of objects that training never shows, in any company."""
    while True:
        caption = _random_caption(rng)
        if caption.never_seen:
            yield caption


def place(caption: Caption, rng: np.random.Generator, spread: float = 1.0) -> list[Placed]:
    """Where the caption's objects stand in one of its pictures; they never touch.

    ``spread`` says how much of what is drawn at random varies: 0 is the same picture every time.
    """
    middle = IMAGE_SIZE / 2
    if caption.relation is None:
        centres = [middle + spread * rng.uniform(-10, 10, 2)]
    else:
        right, down = RELATIONS[caption.relation]
        axis = 0 if right else 1
        near, far = np.empty(2), np.empty(2)
        near[axis] = 16.5 + spread * rng.uniform(-1.5, 1.5)
        far[axis] = 47.5 + spread * rng.uniform(-1.5, 1.5)
        sideways = rng.uniform(-7, 7) + rng.uniform(-4, 4, 2)
        near[1 - axis], far[1 - axis] = middle + spread * sideways
        centres = [near, far] if right + down < 0 else [far, near]
    return [
        Placed(
            item.shape, _jittered(COLOURS[item.colour], rng, spread), *map(float, centre), radius
        )
        for item, centre in zip(caption.items, centres, strict=True)
        for radius in [_radius(item.size, rng, spread)]
    ]


def paint(
    caption: Caption, rng: np.random.Generator, spread: float = 1.0, size: int = IMAGE_SIZE
) -> NDArray[np.uint8]:
    """One of the caption's pictures, [size, size, 3]; ``spread`` as in ``place``."""
    background = _jittered(BACKGROUNDS[caption.background or BACKGROUND], rng, spread)
    return render(place(caption, rng, spread), background, spread * rng.uniform(-1, 1), size)


def paint_crowd(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of up to seven objects anywhere, also over each other: food for the autoencoder."""
    background = BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))]
    placed = [
        Placed(
            str(rng.choice(SHAPES)),
            _jittered(COLOURS[str(rng.choice(list(COLOURS)))], rng),
            *map(float, rng.uniform(8, 56, 2)),
            float(rng.uniform(5.5, 13)),
        )
        for _ in range(rng.integers(1, 8))
    ]
    return render(placed, _jittered(background, rng), rng.uniform(-1, 1))


def render(
    placed: list[Placed],
    background: tuple[float, float, float],
    slope: float,
    size: int = IMAGE_SIZE,
) -> NDArray[np.uint8]:
    """Objects on a background that darkens or brightens downwards, [size, size, 3]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    gradient = slope * _GRADIENT * (y / size * 2 - 1)
    picture = np.asarray(background, np.float32) + gradient[..., None]
    for each in placed:
        distance = outline(each.shape, (x - each.x) / each.radius, (y - each.y) / each.radius)
        alpha = np.clip(0.5 - distance * each.radius, 0, 1)[..., None]
        picture += alpha * (np.asarray(each.rgb, np.float32) - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def outline(shape: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Signed distance (negative inside) from the outline of a shape of radius 1 at the origin."""
    across, down = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            return np.hypot(x, y) - 1
        case "square":
            return np.maximum(across, down) - 1
        case "triangle":  # its tip is up, both its sides fall 2 for 1
            return np.maximum((2 * across - y - 1) / np.float32(np.sqrt(5)), y - 1)
        case "cross":
            long, short = np.maximum(across, down), np.minimum(across, down)
            return np.maximum(long - 1, short - _CROSS_ARM)
    raise ValueError(f"no shape {shape!r}")


def _random_caption(rng: np.random.Generator) -> Caption:
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < _BACKGROUND_SHARE else None
    if rng.random() < _SINGLE_SHARE:
        return Caption((_random_item(rng),), None, background)
    relation = str(rng.choice(list(RELATIONS)))
    return Caption((_random_item(rng), _random_item(rng)), relation, background)


def _random_item(rng: np.random.Generator) -> Item:
    size = str(rng.choice(["small", "large"])) if rng.random() < _SIZE_SHARE else None
    return Item(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size)


def _radius(size: str | None, rng: np.random.Generator, spread: float) -> float:
    least, most = RADII[size]
    return (least + most) / 2 + spread * (most - least) / 2 * float(rng.uniform(-1, 1))


def _jittered(
    rgb: tuple[int, int, int], rng: np.random.Generator, spread: float = 1.0
) -> tuple[float, float, float]:
    red, green, blue = rgb + spread * rng.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, 3)
    return float(red), float(green), float(blue)
