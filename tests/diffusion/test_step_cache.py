"""Step caching: between full steps the deep part of the network is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fuserve.diffusion.denoiser import Denoiser
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.pipeline import ImageTask
from fuserve.diffusion.step_cache import StepCache
from fuserve.errors import InvalidRequestError
from tests.diffusion.model_folders import small_sd, small_sdxl
from tests.diffusion.oracles import assert_close, nhwc

PROMPTS = ["a red circle above", "naïve café!"]
SIZE = {"width": 32, "height": 32}
NEAR = 5e-5


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return small_sd(folder, layers_per_block=2), folder / "model"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sdxl")
    return small_sdxl(folder), folder / "model"


@pytest.fixture(scope="module")
def model(sd: tuple[Any, Path]) -> DiffusionModel:
    return DiffusionModel.load(sd[1])


def latents(images: int, seed: int = 5) -> np.ndarray:
    drawn = torch.randn((images, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    return nhwc(drawn)


def denoiser(
    model: DiffusionModel, timesteps: list[int], cache: StepCache | None, num_prompts: int = 1
) -> Denoiser:
    positive = model.encode_prompts(PROMPTS[:num_prompts])
    negative = model.encode_prompts(["circle"] * num_prompts, negative=True)
    times = np.array(timesteps, np.float32)
    return model.denoiser(positive, negative, times, 32, 32, step_cache=cache)


def pair(found: tuple[np.ndarray | None, np.ndarray]) -> np.ndarray:
    assert found[0] is not None
    return np.stack([found[0], found[1]])


class DeepCacheUNet:
    """diffusers' UNet, one input on its way up replaced by what it was at another step."""

    def __init__(self, unet: Any, branch: int) -> None:
        self.unet, self.feature, self.replaces = unet, None, False
        resnets = [resnet for block in unet.up_blocks for resnet in block.resnets][::-1]
        skips = [unet.conv_in.out_channels]
        for block in unet.down_blocks:
            skips += [resnet.out_channels for resnet in block.resnets]
            skips += [down.out_channels for down in block.downsamplers or ()]
        self.num_skip_channels = skips[branch]
        self.hook = resnets[branch].register_forward_pre_hook(self._swap)

    def _swap(self, _: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        joined, *others = given
        deep = joined[:, : -self.num_skip_channels]
        if not self.replaces:
            self.feature = deep.clone()
            return given
        return (torch.cat([self.feature, joined[:, -self.num_skip_channels :]], dim=1), *others)

    @torch.no_grad()
    def __call__(self, sample: np.ndarray, step: int, text: torch.Tensor) -> np.ndarray:
        seen = torch.from_numpy(sample).permute(0, 3, 1, 2)
        out = self.unet(torch.cat([seen, seen]), step, text).sample
        return nhwc(out)


@pytest.mark.parametrize("executor", ["native", "reference"])
@pytest.mark.parametrize("branch", [0, 1, 2, 3, 5, 8])
def test_a_step_reuses_the_feature_that_deepcache_would(
    executor: Any, branch: int, sd: tuple[Any, Path]
) -> None:
    pipeline, folder = sd
    ours = DiffusionModel.load(folder, DiffusionOptions(executor=executor))
    assert ours.num_cache_branches == 9
    bound = denoiser(ours, [801, 601], StepCache(2, branch))
    oracle = DeepCacheUNet(pipeline.unet, branch)
    try:
        embeds = [ours.encode_prompts([text]).hidden for text in ("circle", PROMPTS[0])]
        text = torch.from_numpy(np.concatenate(embeds))
        first = oracle(latents(1), 801, text)
        oracle.replaces = True
        second = oracle(latents(1, seed=6), 601, text)
    finally:
        oracle.hook.remove()
    assert_close(pair(bound.predict(latents(1), 0))[:, 0], first, NEAR)
    assert bound.share(1) < 1.0
    assert_close(pair(bound.predict(latents(1, seed=6), 1))[:, 0], second, NEAR)
    with torch.no_grad():
        seen = torch.from_numpy(latents(1, seed=6)).permute(0, 3, 1, 2)
        full = nhwc(pipeline.unet(torch.cat([seen, seen]), 601, text).sample)
    assert np.abs(full - second).max() > 100 * NEAR  # the feature matters


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lora"])
@pytest.mark.parametrize("guided", [True, False])
def test_where_nothing_has_changed_a_cached_step_is_a_full_one_to_the_bit(
    kind: str, guided: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipeline, folder = request.getfixturevalue("sdxl" if kind == "sdxl" else "sd")
    loras: tuple[LoraOption, ...] = ()
    if kind == "lora":
        loras = (LoraOption(lora_of(pipeline, tmp_path), 0.7),)
    model = DiffusionModel.load(folder, DiffusionOptions(loras=loras))
    for branch in range(model.num_cache_branches):
        bound = denoiser(model, [500, 500, 500], StepCache(2, branch), num_prompts=2)
        found = [bound.predict(latents(4), step, guided) for step in (0, 1)]
        if guided:
            np.testing.assert_array_equal(pair(found[0]), pair(found[1]))
        np.testing.assert_array_equal(found[0][1], found[1][1])


def lora_of(pipeline: Any, folder: Path) -> Path:
    """Of a block in the deep part and of one that every step computes."""
    tensors = {}
    for path in ("mid_block.attentions.0.proj_in", "up_blocks.2.resnets.2.conv1"):
        weight = pipeline.unet.get_submodule(path).weight
        shape = weight.shape if weight.ndim == 4 else (*weight.shape, 1, 1)
        generator = torch.Generator().manual_seed(len(path))
        down = torch.randn((2, *shape[1:]), generator=generator) * 0.2
        tensors[f"unet.{path}.lora_A.weight"] = down
        tensors[f"unet.{path}.lora_B.weight"] = torch.randn(
            (shape[0], 2, 1, 1), generator=generator
        )
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def shares(task: ImageTask) -> list[bool]:
    """Whether each denoising step was a full one."""
    found = []
    while task.stage != "done":
        if task.stage == "denoise":
            found.append(task.step_share == 1.0)
        task.step()
    return found


def test_every_interval_th_step_is_full(model: DiffusionModel) -> None:
    params = ImageParams(steps=7, cache_interval=3, **SIZE)
    assert shares(ImageTask(model, PROMPTS[:1], [1], params)) == [
        step % 3 == 0 for step in range(7)
    ]


@pytest.mark.parametrize("scheduler", ["euler-a", "unipc", "pndm", "dpm++2m", "lcm"])
def test_the_first_step_from_a_picture_is_full(model: DiffusionModel, scheduler: str) -> None:
    start = np.full((32, 32, 3), 0.5, np.float32)
    params = ImageParams(
        steps=8, strength=0.6, init_image=start, cache_interval=2, scheduler=scheduler
    )
    found = shares(ImageTask(model, PROMPTS[:1], [1], params))
    assert found == [step % 2 == 0 for step in range(len(found))]
    assert len(found) >= 4


def test_guidance_that_begins_needs_a_full_step_and_guidance_that_ends_does_not(
    model: DiffusionModel,
) -> None:
    params = ImageParams(steps=10, cache_interval=4, guidance_interval=(0.2, 0.5), **SIZE)
    found = shares(ImageTask(model, PROMPTS[:1], [1], params))
    assert found == [i in (0, 2, 6) for i in range(10)]


def test_an_interval_of_one_is_no_cache(model: DiffusionModel) -> None:
    plain = ImageParams(steps=3, **SIZE)
    one = ImageParams(steps=3, cache_interval=1, cache_branch=99, **SIZE)
    expected = ImageTask(model, PROMPTS[:1], [1], plain).run()
    np.testing.assert_array_equal(ImageTask(model, PROMPTS[:1], [1], one).run(), expected)


def test_caches_belong_to_their_requests(model: DiffusionModel) -> None:
    """Bit for bit, whatever takes turns or is in the batch."""
    params = ImageParams(steps=5, cache_interval=2, cache_branch=1, **SIZE)
    tasks = [ImageTask(model, [PROMPTS[i]], [i], params) for i in range(2)]
    while any(task.stage != "done" for task in tasks):
        for task in tasks:
            task.step()
    alone = ImageTask(model, PROMPTS[1:], [1], params).run()
    np.testing.assert_array_equal(tasks[1].images, alone)
    together = ImageTask(model, PROMPTS, [0, 1], params).run()
    np.testing.assert_array_equal(together[1:], alone)
    full = ImageTask(model, PROMPTS[1:], [1], ImageParams(steps=5, **SIZE)).run()
    assert not np.array_equal(full, alone)


def test_the_feature_is_counted_and_freed_with_its_request(model: DiffusionModel) -> None:
    held = {}
    for interval in (1, 2):
        params = ImageParams(steps=4, cache_interval=interval, **SIZE)
        task = ImageTask(model, PROMPTS[:1], [1], params)
        assert task.num_bytes == 0
        task.step()
        task.step()
        held[interval] = task.num_bytes
        task.cancel()
        assert task.num_bytes == 0
    assert held[2] - held[1] == 2 * 8 * 8 * 32 * 4  # a guided pair at the last block's input


def test_a_step_on_a_deeper_branch_costs_more(model: DiffusionModel) -> None:
    costs = []
    for branch in range(model.num_cache_branches):
        bound = denoiser(model, [500, 400], StepCache(2, branch))
        assert bound.share(0) == 1.0
        bound.predict(latents(1), 0)
        costs.append(bound.share(1))
    assert costs == sorted(costs)
    assert 0.0 < costs[0] < 0.3
    assert costs[-1] < 1.0


@pytest.mark.parametrize(
    ("keywords", "word"),
    [({"cache_interval": 0}, "cache_interval"), ({"cache_branch": -1}, "cache_branch")],
)
def test_values_out_of_range_are_named(keywords: dict[str, int], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        ImageParams(**keywords)  # type: ignore[arg-type]


def test_a_branch_that_the_model_has_not_is_refused_before_any_work(
    model: DiffusionModel,
) -> None:
    with pytest.raises(InvalidRequestError, match="cache_branch=9 must be below 9"):
        ImageTask(model, PROMPTS[:1], [1], ImageParams(cache_interval=2, cache_branch=9))
