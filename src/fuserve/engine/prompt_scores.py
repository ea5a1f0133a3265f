"""Log probabilities of the tokens of a prompt, as each follows those before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuserve.engine.outputs import TokenLogprobs, token_logprobs
from fuserve.engine.sequence import PromptRows
from fuserve.engine.text_codec import TextCodec
from fuserve.errors import RequestFailedError
from fuserve.kernels.sampling import SampleStatus, score_token

MAX_LOGITS_BYTES = 64 << 20
"""Logits of prompt tokens that one step may hold."""


def max_rows(vocab_size: int) -> int:
    """Prompt tokens that one step may score."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


class PromptScores:
    """Scores a prompt's tokens as their logits come.

    Args:
        prompt_ids: the prompt.
        num_logprobs: most likely alternatives to report beside each token.
        codec: for display; None shows nothing.
    """

    def __init__(
        self, prompt_ids: Sequence[int], num_logprobs: int, codec: TextCodec | None
    ) -> None:
        self.rows = PromptRows("logits", 0, len(prompt_ids) - 1)
        self._prompt_ids = prompt_ids
        self._num_logprobs = num_logprobs
        self._codec = codec
        # Nothing comes before the first token, so nothing tells how likely it was.
        self._entries: list[TokenLogprobs | None] = [None]

    def read(self, logits: npt.NDArray[np.float32]) -> None:
        """Take the next rows of logits, each of which tells of the token behind it  # [rows, vocab]

        Raises:
            RequestFailedError: a row is not usable.
        """
        for row in logits:
            position = self.rows.next + 1
            scored = score_token(row, self._prompt_ids[position], self._num_logprobs)
            if scored.status is not SampleStatus.OK:
                raise RequestFailedError(
                    f"Token {position + 1} of the prompt could not be scored: "
                    f"{scored.status.description}. Other requests go on."
                )
            self._entries.append(token_logprobs(scored, self._display))
            self.rows.next = position

    @property
    def entries(self) -> tuple[TokenLogprobs | None, ...]:
        """One entry a token, as far as they are known; None for the first."""
        return tuple(self._entries)

    def _display(self, token: int) -> str:
        return "" if self._codec is None else self._codec.token_text(token)
