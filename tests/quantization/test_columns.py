"""Columns of quantized weights are what they were in the whole, wherever the cut is."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.checkpoints import Tensor, to_float32
from fuserve.checkpoints.tensor import QUANTIZED
from fuserve.quantization import QuantizedLinear, QuantScheme, grid_from, scheme_from, take_columns
from fuserve.quantization.columns import REGRID
from fuserve.quantization.ggml_grid import GGML_GRIDS
from fuserve.quantization.rounding import round_to_nearest

ROWS, COLS = 11, 300
SCHEMES = [
    QuantScheme(4, 128),
    QuantScheme(4, 64, symmetric=False),
    QuantScheme(4, 32, symmetric=False),
    QuantScheme(8, 128),
    QuantScheme(8, 0),
    QuantScheme(8, 0, activations="token"),
]


def layer(scheme: QuantScheme) -> QuantizedLinear:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((ROWS, COLS)).astype("f4")
    smoothing = rng.uniform(0.5, 2.0, COLS).astype("f4")
    return QuantizedLinear(
        scheme,
        round_to_nearest(weights, scheme),
        input_smoothing=smoothing,
        output_shift=np.arange(ROWS, dtype="f4"),
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
@pytest.mark.parametrize(("first", "stop"), [(0, 128), (128, 300), (64, 250), (96, 300), (32, 64)])
def test_whole_blocks_keep_their_values(scheme: QuantScheme, first: int, stop: int) -> None:
    whole = layer(scheme)
    part = take_columns(whole, first, stop)
    assert part.scheme == scheme_from(scheme, first)
    assert part.shape == (ROWS, stop - first)
    assert np.array_equal(part.values(), whole.values()[:, first:stop])
    assert part.input_smoothing is not None and whole.input_smoothing is not None
    assert np.array_equal(part.input_smoothing, whole.input_smoothing[first:stop])
    assert np.array_equal(part.output_shift, whole.output_shift)
    assert first % scheme.group_size if part.scheme != scheme else True


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=lambda scheme: scheme.describe())
def test_a_cut_through_a_block_rounds_to_int8(scheme: QuantScheme) -> None:
    whole = layer(scheme)
    part = take_columns(whole, 40, 290)
    assert part.scheme == scheme_from(scheme, 40) == REGRID
    expected = whole.values()[:, 40:290]
    assert np.abs(part.values() - expected).max() <= np.abs(expected).max() / 127


def test_rows_with_one_scale_can_be_cut_anywhere() -> None:
    whole = layer(QuantScheme(8, 0))
    part = take_columns(whole, 40, 290)
    assert part.scheme == whole.scheme
    assert np.array_equal(part.values(), whole.values()[:, 40:290])


@pytest.mark.parametrize("dtype", ["Q4_0", "Q8_0", "Q6_K"])
def test_blocks_of_a_gguf_are_cut_as_bytes(dtype: str) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.default_rng(0).standard_normal((4, 1024)).astype("f4")
    if dtype == "Q6_K":  # gguf writes no K types: random bytes are blocks as well
        data = np.random.default_rng(1).integers(0, 30, (4, 4 * 210)).astype("u1")
    else:
        data = quantize(values, GGMLQuantizationType[dtype])
    whole = Tensor("w", dtype, (4, 1024), data)
    part = whole.columns(256, 768)
    assert part.shape == (4, 512)
    assert np.array_equal(to_float32(part), to_float32(whole)[:, 256:768], equal_nan=True)
    assert whole.cuts_blocks(16, 768)
    with pytest.raises(ValueError, match="no whole blocks"):
        whole.columns(16, 768)


def test_a_quantized_tensor_is_cut_with_its_layer() -> None:
    whole = layer(SCHEMES[0])
    tensor = Tensor("w", QUANTIZED, whole.shape, whole.codes.codes, whole)
    part = tensor.columns(64, 192)
    assert part.shape == (ROWS, 128)
    assert np.array_equal(to_float32(part), whole.values()[:, 64:192])


def test_a_grid_that_is_cut_becomes_finer() -> None:
    grid = GGML_GRIDS["Q4_0"]
    assert grid_from(grid, 64) == grid
    assert grid_from(grid, 80) == REGRID.storage
