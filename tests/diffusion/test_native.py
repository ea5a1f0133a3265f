"""Whole programs run natively give what the reference executor gives in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.diffusion.arena import Lifetime, place_values, plan_arena
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights, PackingOptions
from fuserve.diffusion.program import Array, Program, Value
from fuserve.diffusion.program_builder import ProgramBuilder
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_program import prompt_program, time_program, unet_program
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.vae_program import (
    tiny_decoder_program,
    vae_decoder_program,
    vae_encoder_program,
)
from fuserve.diffusion.vae_spec import tiny_vae_spec, vae_spec
from fuserve.diffusion.weights import ArrayWeights
from fuserve.kernels.linear import Storage, WeightFormat
from tests.diffusion.oracles import TEXT, UNETS, VAE, assert_close, randomized, run, weights_of

TOKENS = 7
FLOAT32 = PackingOptions()
Inputs = dict[str, Array]


def drawn(program: Program, seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(value.shape, dtype=np.float32)
        for name, value in program.inputs.items()
    }


def run_natively(
    program: Program,
    weights: ArrayWeights,
    inputs: Mapping[str, Array],
    threads: int = 2,
    options: PackingOptions = FLOAT32,
) -> dict[str, Array]:
    pool = ThreadPool(threads)
    packed = PackedWeights(weights, pool, options)
    return NativeProgram(program, packed, NativeWorkspace(pool)).run(inputs)


def assert_equals_reference(
    program: Program, weights: ArrayWeights, tolerance: float = 1e-5
) -> None:
    inputs = drawn(program)
    ours, wanted = run_natively(program, weights, inputs), run(program, weights, inputs)
    assert ours.keys() == wanted.keys()
    for name in wanted:
        assert_close(ours[name], wanted[name], tolerance)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet(name: str) -> None:
    config = UNETS[name]
    weights = weights_of(randomized(UNet2DConditionModel(**config)))
    spec = unet_spec(Fields(config))
    assert_equals_reference(time_program(spec, 3), weights)
    assert_equals_reference(prompt_program(spec, 2, TOKENS), weights)
    for prompts in (2, 4):  # 2: without guidance, or a pair for each image
        program = unet_program(spec, 2, prompts, 8, 12, tokens=TOKENS)
        assert_equals_reference(program, weights, 3e-5)


@pytest.mark.parametrize(("height", "width"), [(6, 4), (9, 13)])
def test_an_autoencoder(height: int, width: int) -> None:
    weights = weights_of(randomized(AutoencoderKL(**VAE)))
    spec = vae_spec(Fields(VAE))
    assert_equals_reference(vae_decoder_program(spec, 2, height, width), weights, 3e-5)
    assert_equals_reference(vae_encoder_program(spec, 2, 4 * height, 4 * width), weights, 3e-5)


def test_a_tiny_autoencoder() -> None:
    config = {"decoder_block_out_channels": [16] * 3, "num_decoder_blocks": [2, 1, 1]}
    config |= {"encoder_block_out_channels": [16] * 3, "num_encoder_blocks": [1, 1, 1]}
    weights = weights_of(randomized(AutoencoderTiny(**config)))
    spec = tiny_vae_spec(Fields(config))
    assert_equals_reference(tiny_decoder_program(spec, 2, 6, 5), weights)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_text_encoder(activation: str) -> None:
    config = CLIPTextConfig(**TEXT, hidden_act=activation, projection_dim=20)
    weights = weights_of(randomized(CLIPTextModelWithProjection(config)))
    spec = text_encoder_spec(Fields(config.to_dict()), projected=True)
    assert_equals_reference(text_encoder_program(spec, 2, TOKENS, skip=1), weights)


def test_an_image_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads() -> None:
    config = UNETS["sd15"]
    weights = weights_of(randomized(UNet2DConditionModel(**config)))
    spec = unet_spec(Fields(config))
    together = unet_program(spec, 3, 6, 8, 12, tokens=TOKENS)
    inputs = drawn(together)
    batch = run_natively(together, weights, inputs, 3)["prediction"]
    alone = unet_program(spec, 1, 2, 8, 12, tokens=TOKENS)
    for image in range(3):
        own = {
            name: value if name == "time" else value[len(value) // 3 * image :][: len(value) // 3]
            for name, value in inputs.items()
        }
        for threads in (1, 2):
            pair = run_natively(alone, weights, own, threads)["prediction"]
            assert np.array_equal(pair, batch[2 * image : 2 * image + 2])


def test_programs_of_all_sizes_share_packed_weights_and_a_workspace() -> None:
    config = UNETS["sd15"]
    weights = weights_of(randomized(UNet2DConditionModel(**config)))
    spec, pool = unet_spec(Fields(config)), ThreadPool(2)
    packed, workspace = PackedWeights(weights, pool), NativeWorkspace(pool)
    sizes = []
    for height, width in ((8, 8), (12, 4), (16, 16), (8, 8)):
        program = unet_program(spec, 1, 2, height, width, tokens=TOKENS)
        inputs = drawn(program)
        ours = NativeProgram(program, packed, workspace).run(inputs)
        wanted = run_natively(program, weights, inputs)
        assert np.array_equal(ours["prediction"], wanted["prediction"])
        sizes.append(packed.packed_bytes)
        workspace.release()
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (PackingOptions(linear=Storage(WeightFormat.F16), half_conv=True), 2e-3),
        (PackingOptions(linear=Storage(WeightFormat.Q8, 32)), 4e-2),
        (PackingOptions(linear=Storage(WeightFormat.Q4_ASYMMETRIC, 32)), 0.6),
    ],
    ids=["float16", "int8", "int4"],
)
def test_weights_in_fewer_bits(options: PackingOptions, tolerance: float) -> None:
    config = UNETS["sd15"]
    weights = weights_of(randomized(UNet2DConditionModel(**config)))
    program = unet_program(unet_spec(Fields(config)), 1, 2, 8, 8, tokens=TOKENS)
    inputs = drawn(program)
    ours = run_natively(program, weights, inputs, options=options)["prediction"]
    wanted = run(program, weights, inputs)["prediction"]
    error = float(np.abs(ours - wanted).max() / np.abs(wanted).max())
    assert 1e-6 < error <= tolerance


def test_values_that_live_at_once_never_overlap() -> None:
    generator = np.random.default_rng(0)
    spans = []
    for _ in range(60):
        first, length = generator.integers(0, 40), generator.integers(0, 12)
        spans.append(Lifetime(int(generator.integers(1, 900)), int(first), int(first + length)))
    offsets, total = plan_arena(spans)
    assert total <= 0.8 * sum(span.size for span in spans)
    for i, (one, start) in enumerate(zip(spans, offsets, strict=True)):
        assert start % 16 == 0
        assert start + one.size <= total
        for other, begin in list(zip(spans, offsets, strict=True))[:i]:
            apart = start + one.size <= begin or begin + other.size <= start
            assert apart or not one.meets(other)


def test_the_arena_of_a_unet_is_far_smaller_than_its_values() -> None:
    program = unet_program(unet_spec(Fields(UNETS["sd15"])), 1, 2, 8, 8, tokens=TOKENS)
    offsets = place_values(program)

    def floats(value: Value) -> int:
        return value.batch * value.tokens * value.channels

    end = max(offset + floats(value) for value, offset in offsets.items())
    assert end < 0.25 * sum(floats(value) for value in offsets)


def test_a_result_takes_the_place_of_a_residual_that_nothing_reads_later() -> None:
    build = ProgramBuilder()
    image = build.input("image", 1, 8, 8, 4)
    first = build.conv("first", image, 4)
    second = build.conv("second", first, 4, residual=first)  # reads what it would write over
    third = build.conv("third", second, 4, residual=first)
    fourth = build.linear("fourth", third, 4, residual=second)
    last = build.conv("last", third, 4, residual=fourth)
    build.output("image", build.conv("end", last, 4))
    places = place_values(build.finish())
    assert places[second] != places[first]
    assert places[third] == places[first]
    assert places[fourth] == places[second]
    assert places[last] == places[fourth]


def test_inputs_that_do_not_fit_are_refused() -> None:
    build = ProgramBuilder()
    image = build.input("image", 1, 4, 4, 3)
    build.output("image", build.conv("conv", image, 5))
    program = build.finish()
    weights = ArrayWeights(
        {"conv.weight": np.ones((5, 3, 3, 3), np.float32), "conv.bias": np.ones(5, np.float32)}
    )
    zeros: npt.NDArray[np.float32] = np.zeros((1, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="the inputs are"):
        run_natively(program, weights, {"picture": zeros})
    with pytest.raises(ValueError, match=r"input 'image' is \[1, 4, 4, 2\]"):
        run_natively(program, weights, {"image": np.zeros((1, 4, 4, 2), np.float32)})
    assert run_natively(program, weights, {"image": zeros})["image"].shape == (1, 4, 4, 5)
