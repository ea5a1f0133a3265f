"""An image whose bands several ranks make is, bit for bit, the one that a rank makes alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fuserve.diffusion.packed_weights import PackingOptions
from fuserve.diffusion.program import Array, ChannelSums, Conv, Move, Program, Slice
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.diffusion.rank_bands import Bands, band_program
from fuserve.errors import FuserveError, InvalidRequestError
from fuserve.kernels.exchange import segment_bytes
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from tests.diffusion.oracles import run
from tests.diffusion.rounded_weights import RoundedWeights, rounded
from tests.parallel.image_ranks import (
    aligned_zeros,
    communicators,
    drawn,
    random_weights,
    run_alone,
    run_over_ranks,
    small_unet,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def hourglass(height: int, width: int) -> Program:
    """All that is done to rows: halved, attended, doubled, normed, two sources concatenated."""
    build = ProgramBuilder()
    image = build.input("latents", 2, height, width, 6)
    first = build.conv("first", image, 16)
    norm = group_norm("norm", 4, 1e-5, silu=True)
    small = build.conv("down", first, 16, stride=2, norm=norm)
    qkv = build.linear(("q", "k", "v"), small, 48, bias=False)
    parts = (Slice(qkv), Slice(qkv, 16), Slice(qkv, 32))
    small = build.conv("back", build.attention("attention", *parts, 2, 8), 16, residual=small)
    large = build.conv("up", small, 16, upsample=True)
    even = build.normalize("alone", large, group_norm("alone", 2, 1e-5))
    norm = group_norm("both", 4, 1e-5, silu=True)
    build.output("out", build.conv("last", (large, even), 5, norm=norm))
    build.output("small", small)
    return build.finish()


@pytest.mark.parametrize("exact_conv", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 5), (13, 70)])
@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_of_every_height_has_the_same_bits_over_ranks(
    size: int, height: int, width: int, exact_conv: bool
) -> None:
    program, options = hourglass(height, width), PackingOptions(exact_conv=exact_conv)
    weights, inputs = random_weights(program), drawn(program)
    alone = run_alone(program, weights, inputs, options)
    expected = run(program, weights, inputs)
    for outputs in run_over_ranks(size, program, weights, inputs, options):
        for name, output in outputs.items():
            assert np.array_equal(output, alone[name])
            np.testing.assert_allclose(output, expected[name], atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 5), (13, 70)])
@pytest.mark.parametrize("size", [2, 3])
def test_layers_of_integers_have_the_same_bits_over_ranks(
    size: int, height: int, width: int
) -> None:
    def quantize(_: str, weight: Array) -> QuantizedWeight | None:
        if weight.ndim < 2:
            return None
        return rounded(weight, input_scale=0.031 if weight.ndim == 4 else None)

    program = hourglass(height, width)
    weights, inputs = RoundedWeights(random_weights(program), quantize), drawn(program)
    alone = run_alone(program, weights, inputs)
    for outputs in run_over_ranks(size, program, weights, inputs):
        for name, output in outputs.items():
            assert np.isfinite(output).all()
            assert np.array_equal(output, alone[name])


@pytest.mark.parametrize(
    ("name", "size", "height", "prompts"),
    [("sd15", 2, 8, 4), ("sd15", 3, 20, 2), ("sdxl", 2, 12, 4), ("uneven", 4, 28, 2)],
)
def test_a_unet_has_the_same_bits_over_ranks(
    name: str, size: int, height: int, prompts: int
) -> None:
    program, weights = small_unet(name, 2, prompts, height, 8)
    inputs = drawn(program)
    alone = run_alone(program, weights, inputs)["prediction"]
    for outputs in run_over_ranks(size, program, weights, inputs):
        assert np.array_equal(outputs["prediction"], alone)


def test_weights_in_float16_give_the_same_bits_too() -> None:
    program, weights = small_unet("sd15", 1, 2, 12, 8)
    inputs, options = drawn(program), PackingOptions(half_conv=True)
    alone = run_alone(program, weights, inputs, options)["prediction"]
    for outputs in run_over_ranks(2, program, weights, inputs, options):
        assert np.array_equal(outputs["prediction"], alone)


def test_neighbours_are_asked_for_one_row_where_tiles_end_with_bands() -> None:
    program = small_unet("sd15", 1, 2, 32, 8)[0]  # bands of 16, 8 and 4 rows
    bands = Bands(program, ["latents"], 2)
    for op in program.ops:
        if not isinstance(op, Conv) or op.size == 1:
            continue
        for source in op.sources:
            for rank in range(2):
                rows, seen = bands.rows(source, rank), bands.seen(source, rank)
                assert rows.start - seen.start == (1 if rank == 1 else 0)
                assert seen.stop - rows.stop == (1 if rank == 0 else 0)


def test_a_rank_has_its_share_of_the_work_and_sends_little() -> None:
    program = small_unet("sd15", 1, 2, 32, 8)[0]
    for rank in range(2):
        own = band_program(program, ["latents"], rank, 2)
        work = [op for op in own.ops if not isinstance(op, Move | ChannelSums)]
        assert [op.name for op in work] == [op.name for op in program.ops]
        for op, whole in zip(work, program.ops, strict=True):
            assert 2 * op.out.height == whole.out.height
        # Of attention keys and values, but not queries; of the others a few rows or pixels.
        for move in own.ops:
            if not isinstance(move, Move) or move.name in ("pivots", "sums"):
                continue
            if move.is_inner:
                assert [len(rows) for rows in move.rows] in ([1, 1], [1, 0])
            elif move.out != own.outputs["prediction"]:
                assert 3 * move.out.channels == 2 * move.source.value.channels


def test_bands_of_uneven_heights_cover_the_image() -> None:
    program = small_unet("sd15", 1, 2, 28, 8)[0]
    for size in (1, 2, 3, 5, 7):
        bands = Bands(program, ["latents"], size)
        for value in program.values:
            if value not in bands:
                continue
            rows = [row for rank in range(size) for row in bands.rows(value, rank)]
            assert rows == list(range(value.height))


def test_more_ranks_than_rows_are_refused() -> None:
    program = small_unet("sd15", 1, 2, 8, 8)[0]
    with pytest.raises(InvalidRequestError, match=r"2 rows.*patch_parallel=3 ranks: at most 2"):
        band_program(program, ["latents"], 0, 3)


def test_an_operation_that_has_no_bands_is_named() -> None:
    build = ProgramBuilder()
    image = build.input("latents", 1, 4, 4, 8)
    text = build.input("text", 1, 1, 3, 8)
    attended = build.attention("backwards", Slice(text), Slice(image), Slice(image), 1, 8)
    build.output("out", attended)
    with pytest.raises(ValueError, match="'backwards' reads an image"):
        band_program(build.finish(), ["latents"], 0, 2)


def test_a_rank_that_does_not_come_ends_the_others() -> None:
    memory = aligned_zeros(segment_bytes(2, EXCHANGE_FLOATS))
    alone = LocalCommunicator(memory, 0, 2, 0.1)
    with pytest.raises(FuserveError, match="rank 1 did not come"):
        alone.all_gather([np.zeros(3, np.float32), np.zeros(5, np.float32)])


def test_parts_of_all_sizes_reach_all_ranks() -> None:
    """Also such as take several exchanges, and none."""

    sizes = [(7, 0, 33), (EXCHANGE_FLOATS + 1, 3, 2 * EXCHANGE_FLOATS), (0, 0, 1)]
    expected = [
        [np.random.default_rng([r, n]).random(n, np.float32) for r, n in enumerate(each)]
        for each in sizes
    ]

    def exchange(ranks: LocalCommunicator) -> None:
        for wanted in expected:
            parts = [
                part.copy() if rank == ranks.rank else np.full_like(part, -1)
                for rank, part in enumerate(wanted)
            ]
            ranks.all_gather(parts)
            assert all(np.array_equal(a, b) for a, b in zip(parts, wanted, strict=True))

    with ThreadPoolExecutor(3) as threads:
        for each in [threads.submit(exchange, ranks) for ranks in communicators(3)]:
            each.result()
