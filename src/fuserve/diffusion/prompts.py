"""From prompts to what the denoising network reads of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.diffusion.lora import Branches
from fuserve.diffusion.network import Backend, Network
from fuserve.diffusion.parts import TextPart
from fuserve.diffusion.program import Array
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.errors import InvalidRequestError

MAX_CACHED_PROMPTS = 64
MAX_PROMPT_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Encoded prompts.

    Attributes:
        hidden: the text encoders' hidden states  # [prompts, tokens, channels].
        pooled: the last encoder's pooled and projected state, where the model asks for it
            # [prompts, channels].
        keys: names of the rows, equal only where the rows are; for caches.
    """

    hidden: Array
    pooled: Array | None
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hidden)


class PromptEncoder:
    """The text encoders, and the prompts that they encoded lately.

    The empty prompt, which most requests have as their negative one, is never let go.
    """

    def __init__(
        self, parts: Sequence[TextPart], backend: Backend, *, penultimate: bool, pooled: bool
    ) -> None:
        self._encoders = [_TextEncoder(part, backend, penultimate) for part in parts]
        self._pooled = pooled
        self._cache: OrderedDict[str, tuple[Array, Array | None]] = OrderedDict()
        self.num_queries = 0
        self.num_hits = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of a row of hidden states."""
        return self._encoders[0].tokenizer.max_tokens

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Rows for the prompts, each encoded alone and once.

        Raises:
            InvalidRequestError: there is no prompt, or one is no text or far too long.
        """
        if not prompts:
            raise InvalidRequestError("There is no prompt: give at least one.")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InvalidRequestError(f"A prompt must be text, not {type(prompt).__name__}.")
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise InvalidRequestError(
                    f"A prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are "
                    f"taken, of which the model reads some {self.max_tokens} tokens."
                )
        rows = [self._encoded(prompt) for prompt in prompts]
        pooled = [row[1] for row in rows if row[1] is not None]
        return PromptEmbeds(
            np.concatenate([row[0] for row in rows]),
            np.concatenate(pooled) if pooled else None,
            tuple(prompts),
        )

    def set_branches(self, branches: Sequence[Branches]) -> None:
        """Run each encoder with these LoRA branches from now on."""
        for encoder, own in zip(self._encoders, branches, strict=True):
            encoder.network.set_branches(own)
        self._cache.clear()

    def release(self) -> None:
        """Give back the memory in which the encoders run."""
        for encoder in self._encoders:
            encoder.network.release()

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt that are read, those of its begin and end included."""
        return min(len(self._encoders[0].tokenizer.text_ids(prompt)) + 2, self.max_tokens)

    def _encoded(self, prompt: str) -> tuple[Array, Array | None]:
        self.num_queries += 1
        if prompt in self._cache:
            self.num_hits += 1
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        states = [encoder.encode(prompt) for encoder in self._encoders]
        hidden = np.concatenate([state for state, _ in states], axis=2)  # [1, tokens, channels]
        row = (hidden, states[-1][1] if self._pooled else None)
        self._cache[prompt] = row
        if len(self._cache) > MAX_CACHED_PROMPTS:
            del self._cache[next(key for key in self._cache if key)]
        return row


class _TextEncoder:
    def __init__(self, part: TextPart, backend: Backend, penultimate: bool) -> None:
        self._spec, self._weights, self.tokenizer = part.spec, part.weights, part.tokenizer
        self._skip = 1 if penultimate else 0
        self.network = Network(part.weights, backend, 1)

    def encode(self, prompt: str) -> tuple[Array, Array | None]:
        """Hidden states  # [1, tokens, channels], and the pooled state  # [1, channels]."""
        ids = self.tokenizer([prompt])
        tokens, channels = ids.shape[1], self._spec.channels
        if int(ids.max()) >= self._spec.vocab_size:
            raise InvalidRequestError(
                f"The tokenizer knows more tokens than the text encoder's {self._spec.vocab_size}: "
                "they are of different models."
            )
        names = "text_model.embeddings.token_embedding.weight"
        embeddings = self._weights.rows(names, ids).reshape(1, 1, tokens, channels)
        names = "text_model.embeddings.position_embedding.weight"
        embeddings = embeddings + self._weights.rows(names, np.arange(tokens))
        states = self.network.run(
            tokens,
            lambda: text_encoder_program(self._spec, 1, tokens, skip=self._skip),
            {"embeddings": embeddings},
        )
        hidden = states["hidden" if self._skip else "last"].reshape(1, tokens, channels)
        return np.array(hidden), self._pool(states["last"].reshape(tokens, channels), ids[0])

    def _pool(self, states: Array, ids: npt.NDArray[np.int64]) -> Array | None:
        """The projected state of the end of the text."""
        spec = self._spec
        if spec.projection_channels is None:
            return None
        end = ids.argmax() if spec.eos_token_id is None else (ids == spec.eos_token_id).argmax()
        projection = self._weights.float32("text_projection.weight")
        pooled: Array = states[end : end + 1] @ projection.T
        return pooled
