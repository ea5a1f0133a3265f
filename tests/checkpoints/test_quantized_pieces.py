"""A rank reads its own piece of a quantized layer, and nothing else of the file."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuserve.checkpoints import Tensor, open_checkpoint
from fuserve.checkpoints.quantized import QuantizedFolder
from fuserve.checkpoints.quantized.awq import awq_config, write_awq
from fuserve.checkpoints.quantized.bitsandbytes import bitsandbytes_config, write_bitsandbytes
from fuserve.checkpoints.quantized.compressed_tensors import compressed_config, write_compressed
from fuserve.checkpoints.quantized.gptq import gptq_config, write_gptq
from fuserve.checkpoints.safetensors_writer import write_safetensors
from fuserve.quantization import QuantizedLinear, QuantScheme, take_columns
from fuserve.quantization.rounding import round_to_nearest

MODULE = "model.layers.0.mlp.down_proj"
WEIGHT = MODULE + ".weight"

INT4 = QuantScheme(4, 128, symmetric=False)
INT4_SYMMETRIC = QuantScheme(4, 32, symmetric=True)
INT8_GROUPS = QuantScheme(8, 64)
W8A8 = QuantScheme(8, activations="token")
STATIC = QuantScheme(8, activations="tensor")
LLM_INT8 = QuantScheme(8, activations="token", outlier_threshold=6.0)

Writer = Callable[[str, QuantizedLinear], Any]
LAYOUTS: dict[str, tuple[QuantScheme, Writer, Callable[[QuantScheme], Any]]] = {
    "gptq int4": (INT4, write_gptq, lambda scheme: gptq_config(scheme, 0.01)),
    "gptq int4 symmetric": (INT4_SYMMETRIC, write_gptq, lambda scheme: gptq_config(scheme, 0.01)),
    "gptq int8": (INT8_GROUPS, write_gptq, lambda scheme: gptq_config(scheme, 0.01)),
    "awq": (INT4, write_awq, lambda scheme: awq_config(scheme, [])),
    "bitsandbytes": (LLM_INT8, write_bitsandbytes, lambda scheme: bitsandbytes_config(scheme, [])),
    **{
        f"compressed {name}": (
            scheme,
            write_compressed,
            lambda scheme: compressed_config({MODULE: scheme}, [], has_vectors=True),
        )
        for name, scheme in {
            "int4": INT4,
            "int4 symmetric": INT4_SYMMETRIC,
            "int8": INT8_GROUPS,
            "w8a8": W8A8,
            "static": STATIC,
        }.items()
    },
}


def write(folder: Path, layout: str, rows: int, cols: int) -> QuantizedFolder:
    """A folder of one layer of random weights."""
    scheme, write_layer, config = LAYOUTS[layout]
    dice = np.random.default_rng(0)
    codes = round_to_nearest(dice.standard_normal((rows, cols), np.float32), scheme)
    vectors: dict[str, Any] = {}
    if write_layer is write_compressed:
        vectors["input_smoothing"] = dice.uniform(0.5, 2.0, cols).astype(np.float32)
        vectors["output_shift"] = dice.standard_normal(rows).astype(np.float32)
    if scheme.activations == "tensor":
        vectors["input_scale"] = 0.05
    parts = write_layer(MODULE, QuantizedLinear(scheme, codes, **vectors))
    write_safetensors(folder / "model.safetensors", parts)
    full = {"model_type": "llama", "quantization_config": config(scheme)}
    (folder / "config.json").write_text(json.dumps(full))
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, QuantizedFolder)
    return checkpoint


def assert_same(piece: QuantizedLinear | None, expected: QuantizedLinear) -> None:
    assert piece is not None
    assert piece.scheme == expected.scheme and piece.input_scale == expected.input_scale
    assert np.array_equal(piece.codes.codes, expected.codes.codes)
    assert np.array_equal(piece.codes.scales, expected.codes.scales)
    for name in ("input_smoothing", "input_shift", "output_shift"):
        mine, theirs = getattr(piece, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or np.array_equal(mine, theirs)
    minimums = piece.codes.minimums, expected.codes.minimums
    assert (minimums[0] is None) == (minimums[1] is None)
    assert minimums[0] is None or np.array_equal(*minimums)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_piece_is_what_the_whole_layer_has_there(layout: str, tmp_path: Path) -> None:
    rows, cols = 48, 640
    folder = write(tmp_path, layout, rows, cols)
    whole = folder.tensor(WEIGHT).quantized
    assert whole is not None
    for first, stop in ((0, 24), (24, 48), (5, 19), (0, 48)):
        piece = folder.piece(WEIGHT, rows=(first, stop)).quantized
        assert_same(piece, whole.take(slice(first, stop)))
    # On groups, through groups, and through the smallest ones.
    for first, stop in ((0, 256), (256, 640), (128, 320), (64, 352), (32, 640), (48, 200)):
        piece = folder.piece(WEIGHT, cols=(first, stop)).quantized
        assert_same(piece, take_columns(whole, first, stop))
    both = folder.piece(WEIGHT, (8, 32), (256, 512)).quantized
    assert_same(both, take_columns(whole.take(slice(8, 32)), 256, 512))


def bytes_read(path: Path, read: Callable[[QuantizedFolder], Tensor]) -> int:
    """Of the pages of a folder's file, those that come from the disk."""
    folder = open_checkpoint(path)
    assert isinstance(folder, QuantizedFolder)
    file = path / "model.safetensors"
    (mapped,) = {place[0].map for place in folder._folder._places.values()}
    mapped.madvise(mmap.MADV_RANDOM)  # no page is read but those that are looked at
    mapped.madvise(mmap.MADV_DONTNEED)
    with file.open("rb") as stored:
        os.fsync(stored.fileno())
        os.posix_fadvise(stored.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped[len(mapped) // 2]
    if resident_bytes(file) > mmap.PAGESIZE:
        pytest.skip("the system keeps files in memory here")
    read(folder).data.sum()  # some layouts need no unpacking before
    return resident_bytes(file)


def resident_bytes(file: Path) -> int:
    """Of this process's maps of a file."""
    smaps = Path("/proc/self/smaps").read_text()
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)
    found = [re.search(r"Rss: +(\d+) kB", one) for one in maps if str(file) in one]
    return sum(int(one.group(1)) for one in found if one is not None) * 1024


@pytest.mark.parametrize(
    "layout", ["gptq int4", "awq", "bitsandbytes", "compressed int4", "compressed w8a8"]
)
@pytest.mark.parametrize(("rows", "cols"), [(65536, 128), (128, 65536)])
def test_a_rank_reads_only_its_own_half_from_the_disk(
    layout: str, rows: int, cols: int, tmp_path: Path
) -> None:
    write(tmp_path, layout, rows, cols)
    whole = bytes_read(tmp_path, lambda folder: folder.tensor(WEIGHT))
    assert whole > 0.9 * (tmp_path / "model.safetensors").stat().st_size
    for part in range(2):
        span = (part * max(rows, cols) // 2, (part + 1) * max(rows, cols) // 2)
        half = (span, None) if rows > cols else (None, span)
        read = bytes_read(tmp_path, lambda folder, half=half: folder.piece(WEIGHT, *half))
        # Where a half is 16 kB of each line of 32, it is five pages of eight.
        assert 0.45 * whole < read < 0.65 * whole
