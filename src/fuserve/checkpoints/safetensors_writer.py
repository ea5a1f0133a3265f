"""Writing safetensors files and the index of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.layout import NUMPY_DTYPES

Arrays = Mapping[str, npt.NDArray[np.generic]]

ALIGNMENT = 8  # bytes: the header is filled up to a multiple of it
INDEX = "model.safetensors.index.json"

_NAMES = {np.dtype(code): name for name, code in NUMPY_DTYPES.items() if not name.startswith("F8")}
_NAMES[np.dtype("<u2")] = "BF16"  # numpy has no bfloat16; nothing of ours is U16


def write_safetensors(path: Path, arrays: Arrays) -> None:
    """Write one file; ``uint16`` arrays are bfloat16. It has its name only when it is complete."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # The widest first, so that all elements are aligned.
    arrays = dict(sorted(arrays.items(), key=lambda one: -one[1].itemsize))
    for name, array in arrays.items():
        stop = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_index(folder: Path, places: Mapping[str, str], total_bytes: int) -> None:
    """Write which tensor is in which shard of the folder."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(places)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
