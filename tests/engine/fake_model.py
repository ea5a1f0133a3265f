"""A model without weights, and a tokenizer of bytes.

The executor keeps the tokens themselves in its paged cache and reads a sequence's history back
through the block table, so its logits reveal every error of positions, block tables, sharing,
chunking and recomputation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fuserve.architectures.spec import DecoderSpec
from fuserve.checkpoints.decode_stream import DecodeStream
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, StepBatch
from tests.engine.byte_tokenizer import byte_tokenizer_json

EOS = 256
VOCAB_SIZE = 257
HIDDEN_SIZE = 6
Logits = npt.NDArray[np.float32]


def hashed_logits(history: Sequence[int]) -> Logits:
    """Random logits, decided by every token before."""
    seed = zlib.crc32(np.array(history, dtype=np.int32).tobytes())
    logits = np.random.default_rng(seed).standard_normal(VOCAB_SIZE).astype(np.float32)
    logits[EOS] = -9.0
    return logits * 2


def hashed_state(history: Sequence[int]) -> npt.NDArray[np.float32]:
    """A random hidden state, decided by every token up to it."""
    seed = zlib.crc32(np.array(history, dtype=np.int32).tobytes())
    return np.random.default_rng(seed).standard_normal(HIDDEN_SIZE).astype(np.float32)


def repetitive_logits(history: Sequence[int]) -> Logits:
    """Random logits, decided by the last two tokens, of a few letters: runs come back."""
    logits = hashed_logits(history[-2:])
    logits[[*b"abcdef"]] += 6.0
    return logits


def saying(text: str | bytes) -> Callable[[Sequence[int]], Logits]:
    """Says the text after any prompt that ends with "?", then ends its turn."""
    script = [*(text.encode() if isinstance(text, str) else text), EOS]

    def logits_of(history: Sequence[int]) -> Logits:
        asked = max(i for i, token in enumerate(history) if token == ord("?"))
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        logits[script[len(history) - asked - 1]] = 20.0
        return logits

    return logits_of


class FakeExecutor:
    def __init__(
        self,
        num_blocks: int = 64,
        logits_of: Callable[[Sequence[int]], Logits] = hashed_logits,
    ) -> None:
        self.spec = cast(
            DecoderSpec, SimpleNamespace(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE)
        )
        self.num_blocks = num_blocks
        self.batches: list[StepBatch] = []
        self.logits_of = logits_of
        self._cache = np.full((num_blocks, BLOCK_SIZE_TOKENS), -1, dtype=np.int32)

    def step(self, batch: StepBatch) -> Logits:
        self.batches.append(batch)
        histories: dict[int, list[int]] = {}
        for s, table in enumerate(batch.block_tables):
            for i in range(batch.query_starts[s], batch.query_starts[s + 1]):
                position = batch.positions[i]
                block = table[position // BLOCK_SIZE_TOKENS]
                assert block >= 0, "a token was scheduled without a block"
                self._cache[block, position % BLOCK_SIZE_TOKENS] = batch.tokens[i]
        for s, table in enumerate(batch.block_tables):
            for i in range(batch.query_starts[s], batch.query_starts[s + 1]):
                if i in batch.logit_rows or i in batch.hidden_rows:
                    cached = self._cache[table].reshape(-1)
                    histories[i] = cached[: batch.positions[i] + 1].tolist()
        states = [hashed_state(histories[i]) for i in batch.hidden_rows]
        batch.hidden = np.array(states, dtype=np.float32).reshape(len(states), HIDDEN_SIZE)
        rows = [self.logits_of(histories[i]) for i in batch.logit_rows]
        return np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB_SIZE)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._cache[target] = self._cache[source]

    @property
    def largest_step(self) -> int:
        return max(len(batch.tokens) for batch in self.batches)


class ByteCodec:
    """Token ids are bytes; 256 ends a turn."""

    vocab_size = VOCAB_SIZE
    bos_token_id = None
    eos_token_ids = frozenset({EOS})
    special_token_ids = frozenset({EOS})
    has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list((("^" if add_special_tokens else "") + text).encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i != EOS).decode("utf-8", errors="replace")

    def tokenizer_json(self) -> str:
        return byte_tokenizer_json(EOS)

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([token_id])

    def stream(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DecodeStream:
        return DecodeStream(self.decode, prompt_ids)

    def apply_chat_template(self, messages: Sequence[Any], **template_args: Any) -> str:
        return "^" + "".join(f"{m['role']}: {m['content']}?" for m in messages)
