"""Pictures painted in several processes are the ones that a process paints alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuserve import ImageParams, ImageProgress, TextToImage
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.prompts import PromptEmbeds
from fuserve.diffusion.step_cache import StepCache
from fuserve.errors import InvalidRequestError, RankFailedError
from fuserve.parallel.images.assignment import ImageAssignment
from fuserve.parallel.images.commands import Predict, Prepare, Release, Stop, decode, encode
from fuserve.parallel.images.model import GroupModel
from fuserve.parallel.images.options import ImageParallelOptions
from fuserve.parallel.local_group import LocalGroup
from tests.diffusion.model_folders import small_sd, small_sdxl
from tests.parallel.small_groups import resources, settled_resources, until

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = "a red circle above"
PARAMS = ImageParams(
    "naïve café!",
    steps=3,
    seed=7,
    height=48,
    width=32,
    scheduler="euler-a",
    guidance_interval=(0.0, 0.6),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = {"sd": small_sd, "sdxl": small_sdxl}
    made = {}
    for kind, make in makers.items():
        folder = tmp_path_factory.mktemp(kind)
        make(folder)
        made[kind] = folder / "model"
    return made


def group_of(painter: TextToImage) -> GroupModel:
    model = painter._model
    assert isinstance(model, GroupModel)
    return model


@pytest.mark.parametrize(
    ("kind", "cfg", "patch"), [("sd", 2, 1), ("sd", 1, 3), ("sdxl", 2, 1), ("sdxl", 2, 2)]
)
def test_a_picture_has_the_same_bits_over_processes(
    kind: str, cfg: int, patch: int, folders: dict[str, Path]
) -> None:
    """Guided steps and others, an ancestral scheduler, other sizes, no guidance, step caching."""
    cached = {"cache_interval": 3, "cache_branch": 1, "guidance_interval": (0.3, 0.9)}
    requests = [
        PARAMS,
        ImageParams(steps=2, seed=8, height=64, width=48, guidance_scale=1.0),
        ImageParams(steps=6, seed=9, height=48, width=32, **cached),
    ]
    with TextToImage(folders[kind], num_threads=1) as painter:
        alone = [painter.generate(PROMPT, each)[0].pixels for each in requests]
    before = settled_resources()
    with TextToImage(
        folders[kind], num_threads=1, cfg_parallel=cfg, patch_parallel=patch
    ) as painter:
        assert len(group_of(painter).group.process_ids) == cfg * patch - 1
        together = [painter.generate(PROMPT, each)[0].pixels for each in requests]
    assert alone[0].std() > 5
    for one, several in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, several)
    until(lambda: resources()["threads"] <= before["threads"], "threads are left")
    after = settled_resources()
    for what in ("children", "descriptors", "segments", "ports"):
        assert after[what] == before[what], what


def test_a_killed_process_ends_the_call_and_the_next_one_starts_it_again(
    folders: dict[str, Path],
) -> None:
    before = settled_resources()["children"]
    with TextToImage(
        folders["sd"], num_threads=1, patch_parallel=2, step_timeout_s=60.0
    ) as painter:
        expected = painter.generate(PROMPT, PARAMS)[0].pixels
        (worker,) = group_of(painter).group.process_ids

        def kill(_: ImageProgress) -> None:
            os.kill(worker, signal.SIGKILL)

        with pytest.raises(RankFailedError, match=rf"rank 1 \(process {worker}\) was killed"):
            painter.generate(PROMPT, PARAMS, progress=kill)
        group_of(painter).release()  # of a group that has failed there is nothing
        np.testing.assert_array_equal(painter.generate(PROMPT, PARAMS)[0].pixels, expected)
        (another,) = group_of(painter).group.process_ids
        assert another != worker
        group_of(painter).release()
        np.testing.assert_array_equal(painter.generate(PROMPT, PARAMS)[0].pixels, expected)
        assert group_of(painter).group.process_ids == [another]
    assert set(settled_resources()["children"]) <= set(before)


def test_a_call_that_is_interrupted_leaves_no_process_in_a_step(folders: dict[str, Path]) -> None:
    with TextToImage(folders["sd"], num_threads=1, cfg_parallel=2) as painter:
        expected = painter.generate(PROMPT, PARAMS)[0].pixels
        model = group_of(painter)
        halves = model.group.halves
        assert halves is not None
        exchange = halves.all_gather

        def interrupted(parts: object) -> None:
            raise KeyboardInterrupt

        halves.all_gather = interrupted  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            painter.generate(PROMPT, PARAMS)
        assert not model.group.process_ids
        halves.all_gather = exchange  # type: ignore[method-assign]
        np.testing.assert_array_equal(painter.generate(PROMPT, PARAMS)[0].pixels, expected)


def test_a_start_that_is_interrupted_is_made_anew(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with TextToImage(folders["sd"], num_threads=1, cfg_parallel=2) as painter:
        expected = painter.generate(PROMPT, PARAMS)[0].pixels
        group = group_of(painter).group
        group.close()
        with monkeypatch.context() as patched:
            patched.setattr(LocalGroup, "hear", interrupted)
            with pytest.raises(KeyboardInterrupt):
                painter.generate(PROMPT, PARAMS)
        assert not group.process_ids
        np.testing.assert_array_equal(painter.generate(PROMPT, PARAMS)[0].pixels, expected)


def test_what_cannot_be_divided_is_refused_and_ends_nothing(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequestError, match="two halves"):
        TextToImage(folders["sd"], cfg_parallel=3)
    with pytest.raises(InvalidRequestError, match="one process"):
        TextToImage(folders["sd"], patch_parallel=2, executor="reference")
    with TextToImage(folders["sd"], num_threads=1, patch_parallel=2) as painter:
        workers = group_of(painter).group.process_ids
        with pytest.raises(InvalidRequestError, match="take 32 or fewer ranks"):
            painter.generate(PROMPT, ImageParams(steps=1, height=16, width=32))
        painter.generate(PROMPT, ImageParams(steps=1, height=32, width=32))
        assert group_of(painter).group.process_ids == workers


def test_the_command_paints_the_same_picture(folders: dict[str, Path], tmp_path: Path) -> None:
    files = [tmp_path / "alone.png", tmp_path / "together.png"]
    for file, flags in zip(files, ([], ["--cfg-parallel", "2"]), strict=True):
        given = [PROMPT, "-m", str(folders["sd"]), "-o", str(file), "--steps", "2", "--seed", "3"]
        command = [sys.executable, "-m", "fuserve", "image", *given, "--threads", "1", *flags]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_commands_and_assignments_survive_their_way() -> None:
    embeds = PromptEmbeds(np.arange(12, dtype=np.float32).reshape(1, 3, 4), None, ("a\nb",))
    pooled = PromptEmbeds(embeds.hidden, np.ones((1, 2), np.float32), ("",))
    times = np.array([3, 1], np.float32)
    for negative, cache in ((None, None), (pooled, StepCache(3, 1))):
        sent = Prepare(4, (1, 3), pooled, negative, times, 48, 32, 5.5, cache)
        came = decode(encode(sent))
        assert isinstance(came, Prepare)
        assert (came.number, came.kept, came.height, came.width) == (4, (1, 3), 48, 32)
        assert (
            came.guidance_scale == 5.5
            and came.step_cache == cache
            and np.array_equal(came.timesteps, times)
        )
        assert (came.negative is None) == (negative is None)
        assert came.positive.keys == ("",) and came.positive.pooled is not None
        assert np.array_equal(came.positive.pooled, pooled.pooled)
    came = decode(encode(Prepare(1, (), embeds, None, times, 8, 8, 1.0)))
    assert isinstance(came, Prepare)
    assert came.positive.keys == ("a\nb",) and came.positive.pooled is None
    step = decode(encode(Predict(2, embeds.hidden, 7, False)))
    assert isinstance(step, Predict) and (step.number, step.step, step.guided) == (2, 7, False)
    assert np.array_equal(step.latents, embeds.hidden)
    assert decode(encode(Stop())) == Stop()
    assert decode(encode(Release())) == Release()
    with pytest.raises(ValueError, match="length"):
        decode(encode(Predict(2, embeds.hidden, 7, False))[:-4])
    options = DiffusionOptions(vae=Path("v"), loras=(LoraOption("l", 0.5),), num_threads=2)
    assigned = ImageAssignment("m", options, ImageParallelOptions(2, 3))
    read = ImageAssignment.from_json(assigned.to_json())
    assert read.parallel == assigned.parallel and read.options.loras == options.loras
    assert read.options.vae == "v" and read.model == "m"


def test_ranks_of_a_half_are_neighbours() -> None:
    options = ImageParallelOptions(cfg_parallel=2, patch_parallel=3)
    assert options.band_groups() == [[0, 1, 2], [3, 4, 5]]
    assert options.half_groups() == [[0, 3], [1, 4], [2, 5]]
