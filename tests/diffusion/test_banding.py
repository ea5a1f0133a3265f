"""A program in bands gives the bits of the whole one, in less memory."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from diffusers import AutoencoderKL

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.diffusion.arena import program_bytes
from fuserve.diffusion.banding import banded, candidates, fit
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights, PackingOptions
from fuserve.diffusion.program import Array, Program
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm
from fuserve.diffusion.vae_program import vae_decoder_program, vae_encoder_program
from fuserve.diffusion.vae_spec import VaeSpec, vae_spec
from fuserve.diffusion.weights import ArrayWeights
from tests.diffusion.oracles import VAE, assert_close, randomized, run, weights_of

FLOAT32 = PackingOptions()
SIZES = [(24, 16), (13, 22)]


@cache
def autoencoder() -> tuple[VaeSpec, ArrayWeights]:
    return vae_spec(Fields(VAE)), weights_of(randomized(AutoencoderKL(**VAE)))


def drawn(program: Program) -> dict[str, Array]:
    generator = np.random.default_rng(3)
    return {
        name: generator.standard_normal(value.shape, dtype=np.float32)
        for name, value in program.inputs.items()
    }


def run_all(
    programs: list[Program], weights: ArrayWeights, options: PackingOptions = FLOAT32
) -> tuple[list[Array], int]:
    """Their results from the same weights and inputs, and what the packed weights take."""
    pool = ThreadPool(2)
    packed, workspace = PackedWeights(weights, pool, options), NativeWorkspace(pool)
    inputs = drawn(programs[0])
    results = []
    for program in programs:
        (result,) = NativeProgram(program, packed, workspace).run(inputs).values()
        results.append(result)
    return results, packed.packed_bytes


@pytest.mark.parametrize("exact_conv", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_each_value_in_bands_leaves_all_bits_as_they_are(
    height: int, width: int, exact_conv: bool
) -> None:
    spec, weights = autoencoder()
    options = PackingOptions(exact_conv=exact_conv)
    whole = vae_decoder_program(spec, 1, height, width)
    others = [banded(whole, candidate) for candidate in candidates(whole)]
    assert len(others) >= 8
    results, num_bytes = run_all([whole, *others], weights, options)
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    assert num_bytes == run_all([whole], weights, options)[1]


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_decoder_fits_into_less_memory(share: float) -> None:
    spec, weights = autoencoder()
    whole = vae_decoder_program(spec, 1, 64, 48)
    small = fit(whole, int(share * program_bytes(whole)))
    assert program_bytes(small) < 0.75 * program_bytes(whole)
    (wanted, result), _ = run_all([whole, small], weights)
    assert np.array_equal(result, wanted)
    assert fit(whole, program_bytes(whole)) is whole


def test_an_encoder_in_bands() -> None:
    spec, weights = autoencoder()
    whole = vae_encoder_program(spec, 1, 96, 64)
    others = [banded(whole, candidate) for candidate in candidates(whole)]
    assert others
    results, _ = run_all([whole, *others], weights)
    for result in results[1:]:
        assert np.array_equal(result, results[0])


def test_a_value_of_two_sources_that_is_read_with_another() -> None:
    """As a UNet's skips are read."""
    build = ProgramBuilder()
    image, other = build.input("image", 1, 36, 32, 5), build.input("other", 1, 36, 32, 24)
    left = build.conv("left", image, 40)
    right = build.conv("right", image, 24)
    norm = group_norm("norm", 8, 1e-5, silu=True)
    middle = build.conv("middle", (left, right), 40, norm=norm, residual=left)
    norm = group_norm("norm", 8, 1e-5, silu=True)
    build.output("out", build.conv("out", (middle, other), 7, norm=norm))
    whole = build.finish()
    generator = np.random.default_rng(0)
    weights = ArrayWeights(
        {
            names[0]: generator.standard_normal(shape).astype(np.float32)
            for _, names, shape in whole.weight_shapes()
        }
    )
    (candidate,) = (one for one in candidates(whole) if one.producer.name == "middle")
    (wanted, result), _ = run_all([whole, banded(whole, candidate)], weights)
    assert np.array_equal(result, wanted)


def test_the_reference_executor_runs_bands_too() -> None:
    spec, weights = autoencoder()
    whole = vae_decoder_program(spec, 1, 24, 16)
    inputs = drawn(whole)
    wanted = run(whole, weights, inputs)["image"]
    for candidate in list(candidates(whole))[-3:]:
        result = run(banded(whole, candidate), weights, inputs)["image"]
        assert_close(result, wanted, 1e-9)
