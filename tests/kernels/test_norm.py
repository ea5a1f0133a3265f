"""RMSNorm and LayerNorm against float64."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve import _native
from fuserve._native import Norm


@pytest.mark.parametrize("size", [1, 7, 16, 17, 40, 576])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms_equal_float64(isa: str, size: int, layer: bool, with_bias: bool) -> None:
    rng = np.random.default_rng(size)
    x = (3 * rng.standard_normal((5, size)) + 1).astype(np.float32)
    weight = rng.standard_normal(size, dtype=np.float32)
    bias = rng.standard_normal(size, dtype=np.float32) if with_bias else None
    out = np.full_like(x, np.nan)
    _native.normalize(isa, Norm(layer, 1e-5, weight, bias), x, out)
    centred = x.astype(np.float64)
    if layer:
        centred -= centred.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, want if bias is None else want + bias, rtol=2e-5, atol=2e-5)
