"""Small integers packed into 32-bit words, as quantized checkpoints store them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The element of eight that each nibble of an AWQ word holds, lowest nibble first."""


def pack_words(codes: Codes, bits: int, order: tuple[int, ...] | None = None) -> Words:
    """Pack the last dimension, lowest bits first; the last word is filled up with zeros.

    Args:
        codes: values below ``2 ** bits``.  # [rows, cols]
        bits: 4 or 8.
        order: the element that each place of a word takes; by default the elements in order.
    """
    per_word = 32 // bits
    rows, cols = codes.shape
    padded = np.zeros((rows, -(-cols // per_word) * per_word), np.uint8)
    padded[:, :cols] = codes
    split = padded.reshape(rows, -1, per_word)
    if order is not None:
        split = split[:, :, list(order)]
    if bits == 4:
        split = split[:, :, 0::2] | (split[:, :, 1::2] << 4)
    words: Words = np.ascontiguousarray(split).view("<i4").reshape(rows, -1)
    return words


def unpack_words(words: Words, bits: int, cols: int, order: tuple[int, ...] | None = None) -> Codes:
    """The ``cols`` codes of each row; the inverse of :func:`pack_words`.  # [rows, cols]"""
    raw = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(len(words), -1)
    if bits == 4:
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(len(words), -1)
    if order is not None:
        split = raw.reshape(len(words), -1, 32 // bits)
        raw = split[:, :, np.argsort(order)].reshape(len(words), -1)
    return np.ascontiguousarray(raw[:, :cols])


def words(codes: slice, bits: int) -> slice:
    """The words that hold some codes, of which the first begins a word."""
    return slice(codes.start * bits // 32, -(-codes.stop * bits // 32))
