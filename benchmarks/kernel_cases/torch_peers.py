"""torch's own operators, the peers of single kernels."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

from fuserve.kernels.linear import Storage, WeightFormat

from .measure import Call, OnInput, num_copies

Floats = npt.NDArray[np.float32]

FLOATS = {
    WeightFormat.F32: torch.float32,
    WeightFormat.F16: torch.float16,
    WeightFormat.BF16: torch.bfloat16,
}


def linear_peer(storage: Storage, weights: Floats) -> tuple[str, OnInput, int]:
    """Torch's operator for weights of the same width: its name, itself, copies of its weights."""
    if storage.format in FLOATS:
        return _float_linear(FLOATS[storage.format], weights)
    if storage.format in (WeightFormat.Q8, WeightFormat.Q8_CHANNEL):
        return _int8_linear(weights)
    return _int4_linear(weights, storage.group_size)


def _float_linear(dtype: torch.dtype, weights: Floats) -> tuple[str, OnInput, int]:
    weight = torch.from_numpy(weights).to(dtype)
    copies = [weight.clone() for _ in range(num_copies(weight.nbytes))]

    def on(x: Floats) -> Call:
        tokens = torch.from_numpy(x).to(dtype)
        return lambda copy: functional.linear(tokens, copies[copy])

    return f"linear {str(dtype).removeprefix('torch.')}", on, len(copies)


def _int8_linear(weights: Floats) -> tuple[str, OnInput, int]:
    """Dynamic quantization: fp32 tokens, quantized per tensor at every call."""
    scales = torch.from_numpy(np.abs(weights).max(axis=1) / 127)
    zeros = torch.zeros(len(weights), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to remove this one day
        quantized = torch.quantize_per_channel(
            torch.from_numpy(weights), scales, zeros, axis=0, dtype=torch.qint8
        )
    count = num_copies(weights.size)
    prepack, linear = torch.ops.quantized.linear_prepack, torch.ops.quantized.linear_dynamic
    copies = [prepack(quantized, None) for _ in range(count)]

    def on(x: Floats) -> Call:
        tokens = torch.from_numpy(x)
        return lambda copy: linear(tokens, copies[copy])

    return "dynamic int8 linear", on, count


def _int4_linear(weights: Floats, group: int) -> tuple[str, OnInput, int]:
    """Weight-only int4 with bfloat16 tokens, as torchao uses it on CPUs."""
    rows, cols = weights.shape
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.ones(cols // group, rows, 2, dtype=torch.bfloat16)
    copies = [
        (packed.clone(), scales.clone()) for _ in range(num_copies(packed.nbytes + scales.nbytes))
    ]
    linear = torch.ops.aten._weight_int4pack_mm_for_cpu

    def on(x: Floats) -> Call:
        tokens = torch.from_numpy(x).bfloat16()
        return lambda copy: linear(tokens, copies[copy][0], group, copies[copy][1])

    return "int4 weights x bfloat16", on, len(copies)


def attention_peers(
    queries: Floats, keys: Floats, values: Floats, *, half: bool, copies: int
) -> dict[str, Call]:
    """scaled_dot_product_attention of [tokens, heads, head dim] on contiguous caches.

    With 16-bit caches also in float32, which is faster on CPUs without 16-bit arithmetic.
    """
    dtypes = (torch.float16, torch.float32) if half else (torch.float32,)
    calls = {}
    for dtype in dtypes:
        q, k, v = (_heads_first(x, dtype) for x in (queries, keys, values))
        calls[f"sdpa {str(dtype).removeprefix('torch.')}"] = _attention(q, k, v, copies)
    return calls


def _heads_first(x: Floats, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(x).to(dtype).transpose(0, 1)[None].contiguous()


def _attention(queries: Tensor, keys: Tensor, values: Tensor, copies: int) -> Call:
    caches = [(keys.clone(), values.clone()) for _ in range(copies)]
    is_prefill = queries.shape[2] > 1

    def attend(copy: int) -> Tensor:
        cached_keys, cached_values = caches[copy]
        return functional.scaled_dot_product_attention(
            queries, cached_keys, cached_values, is_causal=is_prefill, enable_gqa=True
        )

    return attend


def norm_peer(layer: bool, rows: list[Floats], weight: Floats, eps: float) -> tuple[str, Call]:
    """layer_norm or rms_norm on each of several inputs."""
    inputs = [torch.from_numpy(x) for x in rows]
    w, size = torch.from_numpy(weight), (len(weight),)
    if layer:
        bias = torch.zeros_like(w)
        return "layer_norm", lambda copy: functional.layer_norm(inputs[copy], size, w, bias, eps)
    return "rms_norm", lambda copy: functional.rms_norm(inputs[copy], size, w, eps)
