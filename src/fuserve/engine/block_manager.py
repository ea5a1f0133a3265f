"""Who owns which block of the paged KV cache. Pure data and policy; the memory is elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.errors import CapacityError


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold the keys and values of ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE_TOKENS)


class BlockManager:
    """Reference counts over the blocks of a cache, and the list of free ones.

    A block that several sequences refer to is full and never written again, so sharing needs no
    copy. Block tables live in the sequences; every entry of a table is one reference.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        # Taken from the end: low blocks first, and just freed ones, still in the CPU's caches.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks nobody refers to."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many block tables hold the block."""
        return self._references[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, one reference each.

        Raises:
            CapacityError: if fewer are free; nothing is taken then.
        """
        if num_blocks > len(self._free):
            raise CapacityError(f"{num_blocks} KV-cache blocks asked, {len(self._free)} free.")
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> list[int]:
        """One more reference to each of the blocks; returns them as a new table."""
        for block in blocks:
            self._references[block] += 1
        return list(blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """Give one reference to each block back; blocks without any become free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
