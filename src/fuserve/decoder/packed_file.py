"""The packed weights of a model on disk: written once, memory-mapped at every later start.

Layout: 8 bytes of magic, the length of the JSON header (little-endian u64), the header, zeros up to
a multiple of 4096, then the tensors at the offsets of the header. Files are written under another
name and renamed when complete, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.decoder.storage_plan import PlannedTensor

MAGIC = b"FUSERVE2"
PAGE_BYTES = 4096
USE_FIELDS = {"activations", "outlier_threshold"}
"""Fields of a ``PlannedTensor`` that change nothing in its bytes."""

Memory = npt.NDArray[np.uint8]


def cache_folder() -> Path:
    """Where packed weights are kept: ``FUSERVE_CACHE``, or ``~/.cache/fuserve``."""
    return Path(os.environ.get("FUSERVE_CACHE") or Path.home() / ".cache" / "fuserve") / "packed"


def packed_bytes(plan: Mapping[str, PlannedTensor]) -> int:
    """Bytes of all tensors of a plan."""
    return max(tensor.offset + tensor.num_bytes for tensor in plan.values())


def _stored(tensor: PlannedTensor) -> dict[str, object]:
    """What the header says of a tensor: not how it is used, so that all uses share one file."""
    fields = asdict(tensor)
    return {name: value for name, value in fields.items() if name not in USE_FIELDS}


class PackedFile:
    """The cache file of one plan.

    Args:
        path: where it is or will be.
        plan: what it holds; a file of another plan is not used.
    """

    def __init__(self, path: Path, plan: Mapping[str, PlannedTensor]) -> None:
        self._path = path
        header = json.dumps([_stored(tensor) for tensor in plan.values()]).encode()
        start = MAGIC + len(header).to_bytes(8, "little") + header
        self._start = start.ljust(-(-len(start) // PAGE_BYTES) * PAGE_BYTES, b"\0")
        self._num_bytes = len(self._start) + packed_bytes(plan)
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}")

    def open(self) -> Memory | None:
        """The mapped tensors, or None if there is no complete file of this plan."""
        try:
            with self._path.open("rb") as file:
                is_ours = (
                    os.fstat(file.fileno()).st_size == self._num_bytes
                    and file.read(len(self._start)) == self._start
                )
                return self._map(file.fileno(), mmap.PROT_READ) if is_ours else None
        except OSError:
            return None

    def create(self) -> Memory | None:
        """Mapped memory to pack into, or None if the file cannot be written here.

        The disk space is reserved first: a full disk is an error now, not a signal later.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._unfinished.open("w+b") as file:
                os.posix_fallocate(file.fileno(), 0, self._num_bytes)
                file.write(self._start)
                file.flush()
                return self._map(file.fileno(), mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            self.discard()
            return None

    def commit(self) -> None:
        """Give the complete file its name."""
        os.replace(self._unfinished, self._path)

    def discard(self) -> None:
        """Remove an incomplete file."""
        with suppress(OSError):  # there may not even be a folder
            self._unfinished.unlink()

    def _map(self, descriptor: int, protection: int) -> Memory:
        mapped = mmap.mmap(descriptor, self._num_bytes, mmap.MAP_SHARED, protection)
        return np.frombuffer(mapped, np.uint8)[len(self._start) :]
