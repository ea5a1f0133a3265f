"""Programs whose image several ranks make; here the ranks are threads that share memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights, PackingOptions
from fuserve.diffusion.program import Array, Program
from fuserve.diffusion.rank_executor import Gatherer, RankExecutor
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.weights import ArrayWeights
from fuserve.kernels.exchange import segment_bytes
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from tests.diffusion.oracles import UNETS, randomized, weights_of

FLOAT32 = PackingOptions()


def drawn(program: Program, seed: int = 0) -> dict[str, Array]:
    """Random inputs."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(value.shape, dtype=np.float32)
        for name, value in program.inputs.items()
    }


def small_unet(
    name: str, images: int, prompts: int, height: int, width: int
) -> tuple[Program, ArrayWeights]:
    """One of the tests' denoisers, with random weights."""
    config: Mapping[str, Any] = UNETS[name]
    weights = weights_of(randomized(UNet2DConditionModel(**config)))
    program = unet_program(unet_spec(Fields(config)), images, prompts, height, width, tokens=7)
    return program, weights


def run_alone(
    program: Program,
    weights: ArrayWeights,
    inputs: Mapping[str, Array],
    options: PackingOptions = FLOAT32,
) -> dict[str, Array]:
    """By one rank."""
    pool = ThreadPool(1)
    packed = PackedWeights(weights, pool, options)
    return NativeProgram(program, packed, NativeWorkspace(pool)).run(inputs)


def run_as_rank(
    program: Program,
    weights: ArrayWeights,
    inputs: Mapping[str, Array],
    ranks: Gatherer,
    options: PackingOptions = FLOAT32,
) -> dict[str, Array]:
    """A rank's part, twice: what the first run leaves behind must not matter."""
    pool = ThreadPool(1)
    packed = PackedWeights(weights, pool, options)
    executor = RankExecutor(program, ["latents"], packed, NativeWorkspace(pool), ranks)
    first = executor.run(inputs)
    again = executor.run(inputs)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    return again


def aligned_zeros(num_bytes: int) -> Any:
    """Memory such as ranks of one host share."""
    memory = np.zeros(num_bytes + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip : skip + num_bytes]


def communicators(size: int) -> Sequence[LocalCommunicator]:
    """Of ranks that are threads of this process."""
    memory = aligned_zeros(segment_bytes(size, EXCHANGE_FLOATS))
    return [LocalCommunicator(memory, rank, size, 60.0) for rank in range(size)]


def run_over_ranks(
    size: int,
    program: Program,
    weights: ArrayWeights,
    inputs: Mapping[str, Array],
    options: PackingOptions = FLOAT32,
) -> list[dict[str, Array]]:
    """The outputs that each rank has in the end."""
    with ThreadPoolExecutor(size) as threads:
        running = [
            threads.submit(run_as_rank, program, weights, inputs, ranks, options)
            for ranks in communicators(size)
        ]
        return [each.result() for each in running]
