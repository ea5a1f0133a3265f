"""Who owns which block of the paged KV cache. Pure data and policy; the memory is elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.errors import CapacityError


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold the keys and values of ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE_TOKENS)


class BlockManager:
    """Reference counts over the blocks of a cache, what full ones hold, and which are free.

    A block that several sequences refer to is full and never written again, so sharing needs no
    copy. Block tables live in the sequences; every entry of a table is one reference. A full
    block that nobody refers to any more keeps its contents until its place is needed; the block
    whose last reference went first is given away first.

    Args:
        num_blocks: of the cache.
        retain: keep contents that nobody refers to.

    Attributes:
        num_ever_used: blocks that were ever given away, the lowest ones.
    """

    def __init__(self, num_blocks: int, *, retain: bool = True) -> None:
        self.num_ever_used = 0
        self._references = [0] * num_blocks
        self._retain = retain
        # Taken from the end: low blocks first, so that memory is committed as late as possible,
        # and just freed ones, still in the CPU's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Blocks without references whose contents are kept, oldest first.
        self._retained: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks nobody refers to, retained ones included."""
        return len(self._free) + len(self._retained)

    @property
    def num_retained(self) -> int:
        """Blocks nobody refers to whose contents can be found by their hash."""
        return len(self._retained)

    def references(self, block: int) -> int:
        """How many block tables hold the block."""
        return self._references[block]

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks with these contents, up to the first that is not in the cache."""
        found: list[int] = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: int, content: bytes) -> None:
        """Let a full block that is in use be found by its hash, unless an equal one is."""
        if content not in self._block_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """Blocks that stay free when these are shared."""
        return self.num_free - sum(self._references[block] == 0 for block in blocks)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, one reference each.

        Raises:
            CapacityError: if fewer are free; nothing is taken then.
        """
        if num_blocks > self.num_free:
            raise CapacityError(f"{num_blocks} KV-cache blocks asked, {self.num_free} free.")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in taken:
            self._references[block] = 1
            self.num_ever_used = max(self.num_ever_used, block + 1)
        return taken

    def share(self, blocks: Sequence[int]) -> list[int]:
        """One more reference to each of the blocks; returns them as a new table."""
        for block in blocks:
            self._retained.pop(block, None)
            self._references[block] += 1
        return list(blocks)

    def release(self, blocks: Sequence[int], *, forget: bool = False) -> None:
        """Give one reference to each block of a table back; blocks without any become free.

        Args:
            blocks: of one sequence, in their order.
            forget: the contents are not to be trusted: nobody shall find them.
        """
        for block in reversed(blocks):  # the ends of prefixes are less useful than beginnings
            self._references[block] -= 1
            if forget or (not self._retain and self._references[block] == 0):
                self._forget(block)
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._retained[block] = None
                else:
                    self._free.append(block)

    def forget_all(self) -> None:
        """The cache has lost its contents: nothing in it shall be found."""
        for block in list(self._hash_of):
            self._forget(block)
        self._free += reversed(self._retained)
        self._retained.clear()
        self.num_ever_used = 0

    def _evict(self) -> int:
        block, _ = self._retained.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]
