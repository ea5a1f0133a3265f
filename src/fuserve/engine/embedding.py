"""Pooling: the hidden states of a prompt made into one vector."""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from fuserve.engine.sequence import PromptRows
from fuserve.errors import InvalidRequestError, RequestFailedError

Pooling = Literal["mean", "last"]

_POOLINGS: Final = get_args(Pooling)


class Embedding:
    """Takes the hidden states of a prompt in order and pools them.

    They are added one by one in float64, so the result does not depend on how the prompt was cut
    into chunks.

    Args:
        num_prompt_tokens: of the prompt, at least 1.
        pooling: "mean" of all tokens, or the "last" one.
        normalize: to unit length.

    Attributes:
        rows: which hidden states it reads.
        vector: the embedding, None until all are read  # [hidden]

    Raises:
        InvalidRequestError: the pooling is not known.
    """

    def __init__(self, num_prompt_tokens: int, pooling: Pooling, *, normalize: bool) -> None:
        if pooling not in _POOLINGS:
            raise InvalidRequestError(f"pooling must be one of {_POOLINGS}, got {pooling!r}.")
        first = 0 if pooling == "mean" else num_prompt_tokens - 1
        self.rows = PromptRows("hidden", first, num_prompt_tokens)
        self._num_rows = num_prompt_tokens - first
        self._normalize = normalize
        self._sum: npt.NDArray[np.float64] | None = None  # [hidden]
        self.vector: npt.NDArray[np.float32] | None = None

    def read(self, hidden: npt.NDArray[np.float32]) -> None:
        """Take the next hidden states, after the last norm  # [tokens, hidden]

        Raises:
            RequestFailedError: they are no finite numbers.
        """
        for row in hidden:
            self._sum = row.astype(np.float64) if self._sum is None else self._sum + row
        self.rows.next += len(hidden)
        if self._sum is not None and self.rows.next == self.rows.end:
            self.vector = self._pool(self._sum)

    def _pool(self, total: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        pooled = total / self._num_rows
        if not np.isfinite(pooled).all():
            raise RequestFailedError("The hidden states of the prompt are not finite numbers.")
        if self._normalize:
            # A vector of zeros has no direction and stays what it is.
            pooled = pooled / max(float(np.sqrt(np.sum(pooled * pooled))), 1e-12)
        return pooled.astype(np.float32)
