"""Content hashes of full KV-cache blocks: equal hash, equal tokens from the beginning on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from fuserve.decoder.step import BLOCK_SIZE_TOKENS

_DIGEST_BYTES = 16


def extend_hashes(
    hashes: list[bytes], tokens: Sequence[int], num_blocks: int, salt: bytes = b""
) -> None:
    """Hash the tokens' blocks on, until ``num_blocks`` are hashed.

    A block's hash covers the one before, so it stands for the whole prefix. The hash is
    cryptographic: nobody can make a prompt that finds another prompt's blocks.

    Args:
        hashes: of the leading blocks; extended in place.
        tokens: of the sequence; they fill ``num_blocks`` blocks.
        num_blocks: how many to hash in all.
        salt: starts the chain.
    """
    for block in range(len(hashes), num_blocks):
        before = hashes[-1] if hashes else salt
        content = array("i", tokens[block * BLOCK_SIZE_TOKENS : (block + 1) * BLOCK_SIZE_TOKENS])
        hashes.append(blake2b(before + content.tobytes(), digest_size=_DIGEST_BYTES).digest())
