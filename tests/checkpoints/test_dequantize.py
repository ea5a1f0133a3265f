from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers.integrations.gguf import dequant as torch_dequant

from fuserve.checkpoints import open_checkpoint, to_float32


def _random_blocks(kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """Blocks of random bits whose fp16 scales are ordinary numbers."""
    size = GGML_QUANT_SIZES[kind][1]
    draw = np.random.default_rng(int(kind))
    data = draw.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scales = draw.uniform(-2, 2, (rows, blocks, 2)).astype("<f2").view(np.uint8)
    if kind.name == "Q6_K":
        data[:, :, -2:] = scales[:, :, :2]
    elif kind.name in ("Q4_0", "Q5_0", "Q8_0"):
        data[:, :, :2] = scales[:, :, :2]
    else:
        data[:, :, :4] = scales
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_block_types_mean_what_they_mean_to_transformers(write_gguf, name):
    kind = GGMLQuantizationType[name]
    data = _random_blocks(kind, rows=5, blocks=3)
    tensor = open_checkpoint(write_gguf({"w": (data, kind)})).tensor("w")
    elements = 3 * GGML_QUANT_SIZES[kind][0]
    assert tensor.shape == (5, elements) and tensor.data.shape == data.shape
    theirs = torch_dequant.dequantize(torch.from_numpy(data.copy()), int(kind))
    np.testing.assert_allclose(
        to_float32(tensor), theirs.reshape(5, elements).numpy(), rtol=1e-6, atol=1e-5
    )


def _five_bit_values(block: np.ndarray, with_minimum: bool) -> np.ndarray:
    """Q5_0 and Q5_1 from their definition: 4 low bits in nibbles, the fifth in a 32-bit mask."""
    numbers = block[: 4 if with_minimum else 2].view("<f2").astype(np.float64)
    rest = block[4:] if with_minimum else block[2:]
    high = int(rest[:4].view("<u4")[0])
    values = []
    for index in range(32):
        byte = int(rest[4 + index % 16])
        low = byte & 15 if index < 16 else byte >> 4
        quant = low | (high >> index & 1) << 4
        values.append(
            quant * numbers[0] + numbers[1] if with_minimum else (quant - 16) * numbers[0]
        )
    return np.array(values)


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1"])
def test_five_bit_blocks_follow_their_definition(write_gguf, name):
    kind = GGMLQuantizationType[name]
    data = _random_blocks(kind, rows=3, blocks=2)
    tensor = open_checkpoint(write_gguf({"w": (data, kind)})).tensor("w")
    blocks = data.reshape(3, 2, -1)
    expected = [
        np.concatenate([_five_bit_values(block, name == "Q5_1") for block in row]) for row in blocks
    ]
    np.testing.assert_allclose(to_float32(tensor), np.stack(expected), rtol=1e-6, atol=1e-5)


def test_a_slice_of_block_rows_dequantizes_to_the_slice(write_gguf):
    values = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    data = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(write_gguf({"w": (data, GGMLQuantizationType.Q8_0)}))
    tensor = checkpoint.tensor("w")
    np.testing.assert_array_equal(to_float32(tensor.rows(2, 5)), to_float32(tensor)[2:5])
    np.testing.assert_allclose(to_float32(tensor), values, atol=0.02)


def test_bf16_in_a_gguf_is_widened_exactly(write_gguf):
    values = np.array([[1.0, -2.5, 0.15625]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = write_gguf({"w": (bits.view(np.uint8), GGMLQuantizationType.BF16)})
    np.testing.assert_array_equal(to_float32(open_checkpoint(path).tensor("w")), values)
