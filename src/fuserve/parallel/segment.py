"""Memory that the ranks of one host share. It has no name: it goes when its last process goes."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Segment:
    """Anonymous shared memory, zeros at first, passed to other processes as a file descriptor.

    It takes memory as it is written to, and none in ``/dev/shm``, which containers keep small.

    Attributes:
        descriptor: owned by the segment.
        memory: the bytes; views of it keep them mapped  # [bytes]
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.memory: Bytes = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """New memory."""
        descriptor = os.memfd_create("fuserve", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        return cls(descriptor, num_bytes)

    @classmethod
    def of_process(cls, process_id: int, descriptor: int, num_bytes: int) -> Segment:
        """The segment that another process of this user and host has made.

        Raises:
            OSError: there is no such process or segment, or it may not be seen.
        """
        return cls(os.open(f"/proc/{process_id}/fd/{descriptor}", os.O_RDWR), num_bytes)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.memory.size

    def close(self) -> None:
        """Give the descriptor back; the memory stays as long as anything views it."""
        os.close(self.descriptor)
        self.memory = np.empty(0, np.uint8)
