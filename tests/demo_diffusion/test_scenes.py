"""The scenes that the demo model learns from, and the score that it is measured by."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from tools.demo_diffusion import scenes, score


def some_captions(count: int, seed: int = 0, held_out: bool = False) -> list[scenes.Caption]:
    return list(itertools.islice(scenes.captions(np.random.default_rng(seed), held_out), count))


def test_a_caption_reads_as_english() -> None:
    items = scenes.Item("red", "circle", "small"), scenes.Item("orange", "square")
    caption = scenes.Caption(items, "to the left of", "white")
    assert str(caption) == (
        "a small red circle to the left of an orange square on a white background"
    )
    assert str(scenes.Caption(items[1:])) == "an orange square"


def test_captions_and_pictures_follow_from_the_seed() -> None:
    assert some_captions(20, seed=3) == some_captions(20, seed=3) != some_captions(20, seed=4)
    caption = some_captions(1)[0]
    first, again = (scenes.paint(caption, np.random.default_rng(5)) for _ in range(2))
    assert (first == again).all()


def test_objects_that_are_held_out_never_meet_in_training() -> None:
    trained, held_out = some_captions(3000), some_captions(300, held_out=True)
    met = {tuple(sorted(caption.objects)) for caption in trained}
    shown = {each for caption in trained for each in caption.objects}
    assert not met & {tuple(sorted(caption.objects)) for caption in held_out}
    assert shown >= {each for caption in held_out for each in caption.objects}
    assert not shown & scenes.NEVER_SEEN
    never = itertools.islice(scenes.never_seen_captions(np.random.default_rng(0)), 50)
    assert all(scenes.NEVER_SEEN & set(caption.objects) for caption in never)


def test_every_painted_scene_scores_as_wholly_right() -> None:
    rng = np.random.default_rng(1)
    for caption in some_captions(250):
        assert score.judge(scenes.paint(caption, rng), caption).whole, str(caption)


def test_a_scene_is_wrong_for_another_caption() -> None:
    rng = np.random.default_rng(2)
    for caption, other in itertools.pairwise(some_captions(120, seed=1)):
        if (caption.objects, caption.relation) != (other.objects, other.relation):
            assert not score.judge(scenes.paint(caption, rng), other).content, str(other)


TOLD = scenes.Caption(
    (scenes.Item("red", "circle", "large"), scenes.Item("blue", "square", "small")),
    "above",
    "gray",
)


@pytest.mark.parametrize(
    ("part", "painted"),
    [
        ("count", scenes.Caption(TOLD.items[:1], None, "gray")),
        ("relation", dataclasses.replace(TOLD, items=TOLD.items[::-1], relation="to the left of")),
        ("background", dataclasses.replace(TOLD, background="white")),
        (
            "colours",
            dataclasses.replace(
                TOLD, items=(scenes.Item("orange", "circle", "large"), TOLD.items[1])
            ),
        ),
        (
            "shapes",
            dataclasses.replace(TOLD, items=(scenes.Item("red", "cross", "large"), TOLD.items[1])),
        ),
        (
            "sizes",
            dataclasses.replace(TOLD, items=(scenes.Item("red", "circle", "small"), TOLD.items[1])),
        ),
    ],
)
def test_each_part_of_a_caption_can_be_the_wrong_one(part: str, painted: scenes.Caption) -> None:
    verdict = score.judge(scenes.paint(painted, np.random.default_rng(3)), TOLD)
    assert not getattr(verdict, part)
    assert not verdict.whole
    assert verdict.content == (part in ("background", "sizes"))


def test_the_order_of_a_relation_counts() -> None:
    swapped = dataclasses.replace(TOLD, items=TOLD.items[::-1])
    picture = scenes.paint(swapped, np.random.default_rng(4))
    assert not score.judge(picture, TOLD).content
    same = dataclasses.replace(swapped, relation="below")  # told the other way round
    assert score.judge(scenes.paint(same, np.random.default_rng(4)), TOLD).whole


def test_blobs_and_noise_are_no_shapes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    caption = some_captions(1)[0]
    assert not score.judge(noise, caption).content
    blob = np.full((64, 64, 3), 240, np.uint8)
    blob[30:34, 10:50] = scenes.COLOURS["red"]  # a bar
    seen = score.look(blob)[1]
    assert [(each.colour, each.shape) for each in seen] == [("red", None)]
