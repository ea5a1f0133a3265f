"""ggml's block types become codes without loss."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from fuserve.kernels.linear import WeightFormat
from fuserve.quantization import GGML_GRIDS, codes_of, describe_dtype


@pytest.mark.parametrize("dtype", GGML_GRIDS)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (33, 576)])
def test_codes_and_scales_give_the_values_of_the_file(dtype: str, shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    kind = GGMLQuantizationType[dtype]
    blocks = quantize(weights, kind)
    codes = codes_of(dtype, blocks)
    raw = codes.codes.view(np.int8) if dtype == "Q8_0" else codes.codes
    values = raw.astype(np.float32)
    if GGML_GRIDS[dtype].format == WeightFormat.Q4:
        values -= 8
    values *= np.repeat(codes.scales, 32, axis=1)
    if codes.minimums is not None:
        values += np.repeat(codes.minimums, 32, axis=1)
    np.testing.assert_allclose(values, dequantize(blocks, kind), rtol=1e-6, atol=1e-7)


def test_regridded_types_are_named_as_such() -> None:
    assert describe_dtype("Q6_K") == "Q6_K, regridded to int8, groups of 32"
    assert describe_dtype("Q4_0") == "Q4_0, kept as int4, groups of 32"
    assert describe_dtype("BF16") == "BF16"
