"""A model is held as fast as fits into its budget, and what is planned is what it takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderTiny

from fuserve._native import ThreadPool
from fuserve.diffusion.arena import program_bytes
from fuserve.diffusion.autoencoder import Autoencoder
from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.diffusers_folder import read_diffusers_folder, read_vae
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.memory_plan import MemoryPlan, packing_options, plan_memory, weight_bytes
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.network import Backend, ExecutorMaker
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.packed_weights import PackedWeights
from fuserve.diffusion.parts import ModelParts
from fuserve.diffusion.pipeline import ImageTask
from fuserve.diffusion.program import Array, Executor, Program, Weights
from fuserve.diffusion.unet_program import prompt_program, time_program, unet_program
from fuserve.errors import CapacityError, InvalidRequestError
from tests.diffusion.model_folders import small_sd

PLENTY = 10**9
SIDE = 8  # of the model's own latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    small_sd(path)
    return path / "model"


@pytest.fixture(scope="module")
def parts(folder: Path) -> ModelParts:
    return read_diffusers_folder(folder)


def fitting(parts: ModelParts, dtype: str, budget: int) -> MemoryPlan | None:
    try:
        return plan_memory(parts, DiffusionOptions(dtype=dtype), budget)  # type: ignore[arg-type]
    except CapacityError:
        return None


def least(parts: ModelParts, dtype: str) -> int:
    """The smallest budget that is taken."""
    low, high = 0, PLENTY
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fitting(parts, dtype, middle) else (middle, high)
    return high


@pytest.mark.parametrize(
    "options",
    [DiffusionOptions(), DiffusionOptions(dtype="float16"), DiffusionOptions(exact_conv=True)],
    ids=["float32", "float16", "exact_conv"],
)
def test_weights_take_what_is_planned(parts: ModelParts, options: DiffusionOptions) -> None:
    spec, pool, packing = parts.unet.spec, ThreadPool(2), packing_options(options)
    programs = [unet_program(spec, 1, 2, SIDE, SIDE, tokens=77), prompt_program(spec, 1, 1)]
    programs.append(time_program(spec, 1))
    packed = PackedWeights(parts.unet.weights, pool, packing)
    for program in programs:
        NativeProgram(program, packed, NativeWorkspace(pool))
    assert packed.packed_bytes == weight_bytes(programs, parts.unet.weights, packing)


def test_keys_of_the_text_and_the_times_stay_float32(parts: ModelParts) -> None:
    packing = packing_options(DiffusionOptions(dtype="float16"))
    for program in (prompt_program(parts.unet.spec, 1, 1), time_program(parts.unet.spec, 1)):
        whole = weight_bytes([program], parts.unet.weights, packing_options(DiffusionOptions()))
        assert weight_bytes([program], parts.unet.weights, packing) == whole


def test_what_memory_falls_short_of_goes_in_the_order_of_its_use(parts: ModelParts) -> None:
    plenty = fitting(parts, "auto", PLENTY)
    assert plenty is not None
    assert not plenty.packing.half_conv
    assert plenty.packing == packing_options(DiffusionOptions())
    floats, halves = least(parts, "float32"), least(parts, "float16")
    assert halves < floats <= plenty.total
    tight = fitting(parts, "auto", floats)
    assert tight is not None
    assert tight.total == floats
    assert not tight.packing.half_conv
    half = fitting(parts, "auto", floats - 1)
    assert half is not None
    assert half.packing.half_conv
    with pytest.raises(CapacityError, match=r"0\.10 GB .* float32 .* float16 ") as caught:
        plan_memory(parts, DiffusionOptions(), 10**8)
    for one in (floats, halves):
        assert f"{one / 1e9:.2f} GB" in str(caught.value)


def test_a_size_that_does_not_fit_is_refused_before_it_is_begun(
    folder: Path, parts: ModelParts
) -> None:
    options = DiffusionOptions(memory_bytes=least(parts, "float16"))
    model = DiffusionModel.load(folder, options)
    prompts = model.encode_prompts(["a red circle"])
    side = SIDE * model.scale_factor
    times = np.array([500.0], np.float32)
    model.denoiser(prompts, None, times, side, side)
    with pytest.raises(CapacityError, match="Ask for a smaller one, or give "):
        model.denoiser(prompts, None, times, 2 * side, 2 * side)


def test_a_picture_to_start_from_is_not_encoded_where_its_size_does_not_fit(
    folder: Path, parts: ModelParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DiffusionModel.load(folder, DiffusionOptions(memory_bytes=least(parts, "float16")))
    sides: list[int] = []
    encode = model.encode

    def noting(images: Array) -> Array:
        sides.append(images.shape[1])
        return encode(images)

    monkeypatch.setattr(model, "encode", noting)
    side = SIDE * model.scale_factor

    def begun(side: int) -> None:
        start = np.zeros((side, side, 3), np.float32)
        ImageTask(model, ["a red circle"], [1], ImageParams(steps=2, init_image=start)).step()

    begun(side)
    with pytest.raises(CapacityError, match="Ask for a smaller one, or give "):
        begun(2 * side)
    assert sides == [side]


class _Noting(ExecutorMaker):
    """Notes what the programs take."""

    def __init__(self, backend: Backend, num_bytes: list[int], weights: Weights) -> None:
        self._make, self._num_bytes = backend(weights), num_bytes

    def __call__(self, program: Program) -> Executor:
        self._num_bytes.append(program_bytes(program))
        return self._make(program)


@pytest.mark.parametrize("kind", ["usual", "tiny"])
def test_large_pictures_are_decoded_and_encoded_in_bands(
    kind: str, parts: ModelParts, tmp_path: Path
) -> None:
    part = parts.vae
    if kind == "tiny":
        AutoencoderTiny(num_encoder_blocks=[1, 1, 1, 1]).save_pretrained(tmp_path)
        part = read_vae(tmp_path)
    options = DiffusionOptions(num_threads=2)
    backend = make_backend(options, packing_options(options))
    random = np.random.default_rng(0)
    latents = random.standard_normal((2, 32, 24, 4), dtype=np.float32)
    images = random.random((2, 96, 64, 3), dtype=np.float32)
    made, taken = [], []
    for most in (PLENTY, 0):
        num_bytes: list[int] = []
        vae = Autoencoder(part, partial(_Noting, backend, num_bytes), 1, most)
        made.append((vae.decode(latents), vae.encode(images)))
        taken.append(num_bytes)
    for whole, bands in zip(*made, strict=True):
        assert np.array_equal(bands, whole)
    (decoding, encoding), (decoding_bands, encoding_bands) = taken
    assert decoding_bands < decoding
    if kind == "tiny":  # the usual encoder has no value that bands would save
        assert encoding_bands < encoding


def test_the_reference_executor_has_no_budget() -> None:
    with pytest.raises(InvalidRequestError, match="native"):
        DiffusionOptions(executor="reference", memory_bytes=PLENTY)
