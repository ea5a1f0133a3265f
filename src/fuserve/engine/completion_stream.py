"""CompletionStream: the pieces of one request, as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator

from fuserve.engine.outputs import Piece, RequestOutput, RequestUpdate


class CompletionStream(Iterator[Piece]):
    """Iterate over it for the pieces; closing or dropping it aborts the request.

    The texts of all pieces joined (of one ``index``, if ``n > 1``) are the completion's text.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        output: the whole request once its last piece has come, None before.
    """

    def __init__(
        self, num_prompt_tokens: int, updates: Generator[RequestUpdate, None, None]
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.output: RequestOutput | None = None
        # A generator of our own would refer to us, and dropping us would free nothing.
        self._updates = updates
        self._pieces: deque[Piece] = deque()

    def __iter__(self) -> CompletionStream:
        return self

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            RequestFailedError: the request failed while it ran.
        """
        while not self._pieces:
            try:
                update = next(self._updates)
            except StopIteration:
                if self.output is not None and self.output.error is not None:
                    raise self.output.error from None
                raise
            self._pieces.extend(update.pieces)
            self.output = update.output
        return self._pieces.popleft()

    def close(self) -> None:
        """Abort the request if it has not ended."""
        self._pieces.clear()
        self._updates.close()
