"""A program run operation by operation computes the same, and shows what its layers read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.memory_plan import packing_options
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.program import Array, Conv, Linear, Program, Slice
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm, layer_norm
from fuserve.diffusion.stepwise import tapped
from fuserve.diffusion.weights import ArrayWeights
from tests.diffusion.oracles import assert_close

NATIVE = DiffusionOptions(num_threads=1, exact_conv=True)
REFERENCE = DiffusionOptions(executor="reference")


def program() -> Program:
    """Every kind of operation; the second source has one row for both rows of the image."""
    build = ProgramBuilder()
    image, skip = build.input("image", 2, 4, 4, 16), build.input("skip", 1, 4, 4, 8)
    joined = build.conv("joined", (image, skip), 16, norm=group_norm("norm", 4, 1e-5, silu=True))
    short = build.conv("short", (image, skip), 16, size=1, residual=joined)
    qkv = build.linear("qkv", short, 48, norm=layer_norm("ln", 1e-5))
    query, key, value = (Slice(qkv, first) for first in (0, 16, 32))
    context = build.attention("attention", query, key, value, 2, 8)
    wide = build.linear("wide", context, 32, activation="geglu")
    alone = build.normalize("alone", wide, group_norm("last", 4, 1e-5))
    build.output("image", build.linear("out", alone, 16, residual=short))
    return build.finish()


def weights_of(program: Program) -> ArrayWeights:
    rng = np.random.default_rng(1)
    arrays = {}
    for _, names, shape in program.weight_shapes():
        arrays[names[0]] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
    return ArrayWeights(arrays)


def inputs_of(program: Program) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        name: rng.standard_normal(value.shape, np.float32) for name, value in program.inputs.items()
    }


@pytest.mark.parametrize("options", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_it_computes_what_the_program_computes(options: DiffusionOptions) -> None:
    whole = program()
    weights, inputs = weights_of(whole), inputs_of(whole)
    make = make_backend(options, packing_options(options))
    expected = make(weights)(whole).run(inputs)["image"]
    stepwise = tapped(make, lambda _, x: x)(weights)(whole)
    assert_close(stepwise.run(inputs)["image"], expected, 2e-6)


def test_layers_show_their_inputs_after_norms_with_the_sources_side_by_side() -> None:
    whole = program()
    weights, inputs = weights_of(whole), inputs_of(whole)
    seen: dict[str, Array] = {}

    def tap(op: Conv | Linear, x: Array) -> Array:
        seen[op.name] = x
        return x

    tapped(make_backend(NATIVE, packing_options(NATIVE)), tap)(weights)(whole).run(inputs)
    assert list(seen) == ["joined", "short", "qkv", "wide", "out"]
    both = np.concatenate([inputs["image"], inputs["skip"].repeat(2, axis=0)], axis=-1)
    np.testing.assert_array_equal(seen["short"], both)
    scale, shift = (torch.from_numpy(weights.float32(f"norm.{end}")) for end in ("weight", "bias"))
    normalized = functional.group_norm(
        torch.from_numpy(both).permute(0, 3, 1, 2), 4, scale, shift, 1e-5
    )
    expected = functional.silu(normalized).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(seen["joined"], expected, atol=2e-6)


def test_what_a_tap_returns_is_what_the_layer_reads() -> None:
    whole = program()
    weights, inputs = weights_of(whole), inputs_of(whole)

    def zero(op: Conv | Linear, x: Array) -> Array:
        return np.zeros_like(x) if op.name in ("joined", "short", "out") else x

    result = tapped(make_backend(NATIVE, packing_options(NATIVE)), zero)(weights)(whole).run(
        inputs
    )["image"]
    biases = [weights.float32(f"{name}.bias") for name in ("joined", "short", "out")]
    expected = np.broadcast_to(np.sum(biases, axis=0), result.shape)
    np.testing.assert_allclose(result, expected, atol=1e-6)
