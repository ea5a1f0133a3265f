"""A tokenizer whose token ids are bytes, in the form of a tokenizer.json."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers


def byte_tokenizer_json(eos: int) -> str:
    """Ids 0 to 255 are the bytes; ``eos``, 256, is special."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    alphabet |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary | {"<eos>": eos}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", normalized=False, special=True)])
    text: str = backend.to_str()
    return text
