"""Layers of integers run natively give what the reference executor gives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights
from fuserve.diffusion.program import Array, Conv, Executor, Linear, Program, Slice
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm, layer_norm
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.diffusion.reference import ReferenceExecutor
from fuserve.diffusion.stepwise import StepwiseExecutor
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.weights import ArrayWeights
from fuserve.errors import CheckpointError, UnsupportedModelError
from tests.diffusion.oracles import UNETS, randomized, run, weights_of
from tests.diffusion.rounded_weights import RoundedWeights, rounded

STEP = 0.031
"""A fixed scale of inputs, no power of two."""


def multipliers(count: int) -> Array:
    return np.geomspace(0.4, 2.5, count, dtype=np.float32)


def weights_for(
    program: Program, quantize: Callable[[str, Array], QuantizedWeight | None]
) -> RoundedWeights:
    """Random weights of all shapes that the program names."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for _, names, shape in program.weight_shapes():
        rows = shape[0] // len(names)
        for name in names:
            noise = generator.standard_normal((rows, *shape[1:]), np.float32)
            arrays[name] = noise / np.float32(np.sqrt(max(noise[0].size, 1)))
    return RoundedWeights(ArrayWeights(arrays), quantize)


def run_natively(
    program: Program, weights: ArrayWeights, inputs: dict[str, Array], threads: int = 2
) -> dict[str, Array]:
    pool = ThreadPool(threads)
    return NativeProgram(program, PackedWeights(weights, pool), NativeWorkspace(pool)).run(inputs)


def assert_equals_reference(
    program: Program,
    weights: ArrayWeights,
    tolerance: float,
    inputs: dict[str, Array] | None = None,
) -> None:
    """Of these inputs, or random ones."""
    if inputs is None:
        generator = np.random.default_rng(1)
        inputs = {
            name: generator.standard_normal(value.shape, np.float32)
            for name, value in program.inputs.items()
        }
    ours, wanted = run_natively(program, weights, inputs), run(program, weights, inputs)
    for name in wanted:
        difference = np.abs(ours[name] - wanted[name]).max()
        assert difference <= tolerance * np.abs(wanted[name]).max()


def conv_program(form: str) -> Program:
    build = ProgramBuilder()
    image = build.input("image", 2, 7, 9, 40)
    time = build.input("time", 1, 1, 1, 60)
    old = build.input("old", 2, 7, 9, 24)
    match form:
        case "epilogue":
            out = build.conv("c", image, 24, channel_add=Slice(time, 7), residual=old)
        case "two sources":
            out = build.conv("c", (image, old), 20)
        case "stride":
            out = build.conv("c", image, 24, stride=2)
        case "upsample":
            out = build.conv("c", image, 24, upsample=True)
        case _:
            out = build.conv("c", image, 24, size=1, residual=old)
    build.output("out", out)
    return build.finish()


@pytest.mark.parametrize("form", ["epilogue", "two sources", "stride", "upsample", "1x1"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_convolution(form: str, smooth: bool) -> None:
    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        if not name.endswith("weight"):
            return None
        multiplier = multipliers(weight.shape[1]) if smooth else None
        return rounded(weight, input_scale=STEP, multiplier=multiplier)

    program = conv_program(form)
    assert_equals_reference(program, weights_for(program, quantize), 1e-6)


Scheme = tuple[Literal[4, 8], int, float | None]
SCHEMES: dict[str, Scheme] = {
    "w8a8 token": (8, 0, None),
    "w8a8 fixed": (8, 0, STEP),
    "w8a8 groups": (8, 32, None),
    "w4a8": (4, 32, None),
    "w4a8 groups of 64": (4, 64, None),
    "w4a8 channel": (4, 0, None),
}


def linear_program(form: str) -> Program:
    build = ProgramBuilder()
    tokens = build.input("tokens", 2, 3, 7, 72)
    old = build.input("old", 1, 3, 7, 24)
    match form:
        case "stack":
            out = build.linear(("q", "k", "v"), tokens, 72, bias=False)
        case "geglu":
            out = build.linear("l", tokens, 20, activation="geglu")
        case _:
            out = build.linear("l", tokens, 24, residual=old)
    build.output("out", out)
    return build.finish()


@pytest.mark.parametrize("form", ["stack", "geglu", "residual"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("smooth", [False, True])
def test_a_linear(form: str, scheme: str, smooth: bool) -> None:
    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        if not name.endswith("weight") or weight.ndim < 2:
            return None
        multiplier = multipliers(weight.shape[1]) if smooth else None
        return rounded(weight, *SCHEMES[scheme], multiplier)

    program = linear_program(form)
    assert_equals_reference(program, weights_for(program, quantize), 1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, "convolution"])
def test_values_between_two_steps_are_rounded_to_the_same_one(scheme: str) -> None:
    build = ProgramBuilder()
    x = build.input("x", 1, 1, 50, 64)
    out = build.conv("l", x, 8, size=1) if scheme == "convolution" else build.linear("l", x, 8)
    build.output("out", out)
    program = build.finish()
    steps = np.random.default_rng(2).integers(-127, 127, (1, 1, 50, 64)) + np.float32(0.5)
    steps[..., ::32] = 127  # what a scale of its own is taken of
    sizes = np.linspace(STEP, 1, 50, dtype=np.float32)[:, None]
    is_fixed = scheme in ("convolution", "w8a8 fixed")
    inputs = (steps * (np.float32(STEP) if is_fixed else sizes)).astype(np.float32)

    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        if weight.ndim < 2:
            return None
        return rounded(weight, *SCHEMES.get(scheme, (8, 0, STEP)))

    assert_equals_reference(program, weights_for(program, quantize), 1e-6, {"x": inputs})


def test_a_norm_before_the_rounding() -> None:
    build = ProgramBuilder()
    image, old = build.input("image", 2, 9, 8, 64), build.input("old", 2, 9, 8, 32)
    norm = group_norm("norm", 8, 1e-5, silu=True)
    out = build.conv("c", (image, old), 32, norm=norm)
    out = build.linear("l", out, 48, norm=layer_norm("n", 1e-5), activation="silu")
    build.output("out", out)
    program = build.finish()

    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        if weight.ndim < 2:
            return None
        return rounded(weight, input_scale=STEP if name.startswith("c") else None)

    # A value beside a tie may be rounded to either side.
    assert_equals_reference(program, weights_for(program, quantize), 2e-2)


def quantized_unet(name: str) -> tuple[ArrayWeights, RoundedWeights]:
    """A small denoiser, and the same with most layers of the program in integers."""
    floats = weights_of(randomized(UNet2DConditionModel(**UNETS[name])))
    program = unet_program(unet_spec(Fields(UNETS[name])), 1, 2, 8, 8, tokens=7)
    input_scales: dict[str, float | None] = {}
    for op in program.ops:
        if isinstance(op, Conv) and op.name not in ("conv_in", "conv_out"):
            input_scales[op.weight[0]] = 5 / 127 if op.norm else 12 / 127
        elif isinstance(op, Linear):
            input_scales |= dict.fromkeys(op.weight)

    def quantize(tensor: str, weight: Array) -> QuantizedWeight | None:
        if tensor not in input_scales:
            return None
        return rounded(weight, input_scale=input_scales[tensor])

    return floats, RoundedWeights(floats, quantize)


class Makers:
    """Makes executors of one kind."""

    def __init__(self, make: Callable[[Program], Executor]) -> None:
        self._make = make

    def __call__(self, program: Program) -> Executor:
        return self._make(program)

    def forget(self, names: Collection[str]) -> None:
        """Nothing is kept."""


def run_both_stepwise(
    program: Program, weights: ArrayWeights, inputs: dict[str, Array]
) -> tuple[Array, list[float]]:
    """The reference's prediction, and how far the native inputs of each layer are from its own.

    Native layers go on with the reference's inputs: otherwise a value that was rounded to the other
    side would change what all later layers round, and the comparison would see little else.
    """
    seen: list[Array] = []
    differences: list[float] = []

    def record(_: Conv | Linear, x: Array) -> Array:
        seen.append(x)
        return x

    def compare(_: Conv | Linear, x: Array) -> Array:
        theirs = seen[len(differences)].reshape(x.shape)
        differences.append(float(np.sqrt(((x - theirs) ** 2).mean()) / theirs.std()))
        return theirs

    def reference(part: Program) -> Executor:
        return ReferenceExecutor(part, weights, dtype=torch.float64)

    pool = ThreadPool(2)
    packed, workspace = PackedWeights(weights, pool), NativeWorkspace(pool)
    wanted = StepwiseExecutor(program, Makers(reference), record).run(inputs)["prediction"]
    native = Makers(lambda part: NativeProgram(part, packed, workspace))
    ours = StepwiseExecutor(program, native, compare).run(inputs)["prediction"]
    differences.append(float(np.sqrt(((ours - wanted) ** 2).mean()) / wanted.std()))
    return wanted, differences


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet(name: str) -> None:
    floats, integers = quantized_unet(name)
    program = unet_program(unet_spec(Fields(UNETS[name])), 2, 4, 8, 12, tokens=7)
    generator = np.random.default_rng(0)
    inputs = {
        key: generator.standard_normal(value.shape, np.float32)
        for key, value in program.inputs.items()
    }
    exact = run(program, floats, inputs)["prediction"]
    wanted, differences = run_both_stepwise(program, integers, inputs)
    noise = np.sqrt(((wanted - exact) ** 2).mean())
    assert 1e-3 < noise / exact.std() < 0.1
    # A value beside a tie is rounded to another side now and then.
    assert np.median(differences) < 1e-6
    assert max(differences) < 2e-3
    ours = run_natively(program, integers, inputs)["prediction"]
    for image in range(2):
        alone = unet_program(unet_spec(Fields(UNETS[name])), 1, 2, 8, 12, tokens=7)
        own = {
            key: value if key == "time" else value[len(value) // 2 * image :][: len(value) // 2]
            for key, value in inputs.items()
        }
        pair = run_natively(alone, integers, own, 1)["prediction"]
        assert np.array_equal(pair, ours[2 * image : 2 * image + 2])


def test_matrices_of_one_product_must_be_quantized_alike() -> None:
    program = linear_program("stack")

    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        return rounded(weight, input_scale=STEP, multiplier=multipliers(72))

    for changed in (
        {"bits": 4},
        {"group_size": 32},
        {"input_scale": 0.5},
        {"input_scale": None},
        {"multiplier": None},
        {"multiplier": np.ones(72, np.float32)},
    ):
        for name in ("q.weight", "k.weight"):
            weights = weights_for(program, quantize)
            weights.replace(name, **changed)
            with pytest.raises(CheckpointError, match=f"tensor '{name}'"):
                run_natively(program, weights, {})
    mixed = weights_for(program, lambda name, w: None if "v" in name else quantize(name, w))
    with pytest.raises(CheckpointError, match=r"'v\.weight'.* not quantized"):
        run_natively(program, mixed, {})


@pytest.mark.parametrize(
    ("scheme", "form"),
    [((4, 32, None), "conv"), ((8, 0, None), "conv"), ((4, 32, STEP), "l"), ((8, 96, None), "l")],
)
def test_a_scheme_without_arithmetic_is_refused(scheme: Scheme, form: str) -> None:
    program = conv_program("stride") if form == "conv" else linear_program("residual")

    def quantize(name: str, weight: Array) -> QuantizedWeight | None:
        return rounded(weight, *scheme) if name.endswith("weight") else None

    weights = weights_for(program, quantize)
    with pytest.raises(UnsupportedModelError, match=r"^(c|l): "):
        run_natively(program, weights, {})
