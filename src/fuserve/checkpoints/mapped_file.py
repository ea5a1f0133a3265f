"""A weights file mapped into memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.errors import CheckpointError

SAMPLE_BYTES = 4096


class MappedFile:
    """Read-only bytes of one file, without reading them.

    Attributes:
        path: the file.
        size: its length in bytes.
        map: the mapping; sliceable like ``bytes``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError("the file is empty.", file=path, remedy=FETCH_AGAIN)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"cannot be read ({reason}).", file=path) from error
        self._bytes = np.frombuffer(self.map, dtype=np.uint8)  # [size]

    def view(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes ``start:stop``, without a copy."""
        return self._bytes[start:stop]

    def release(self, start: int, stop: int) -> None:
        """Drop the whole pages within ``start:stop`` from this process's resident memory."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def samples(self, ranges: Iterable[tuple[int, int]]) -> Iterable[bytes]:
        """Up to three pieces of ``SAMPLE_BYTES`` from each range: its start, middle and end.

        Read with ``pread``: touching the map would fault in far more than is looked at.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for start, stop in ranges:
                if stop - start <= 3 * SAMPLE_BYTES:
                    yield os.pread(descriptor, stop - start, start)
                    continue
                middle = (start + stop) // 2
                for offset in (start, middle, stop - SAMPLE_BYTES):
                    yield os.pread(descriptor, SAMPLE_BYTES, offset)
        finally:
            os.close(descriptor)


FETCH_AGAIN = "Fetch the file again; the download may have been cut short."
