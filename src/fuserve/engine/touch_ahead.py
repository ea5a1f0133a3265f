"""TouchAhead: makes the KV cache's memory real before a step has to wait for that."""

from __future__ import annotations

from fuserve.decoder.step import Executor


class TouchAhead:
    """Writes to blocks that nobody has used yet, one after each step.

    The system commits memory when it is first written, which takes milliseconds a block in a
    virtual machine. Sequences that began together need new blocks in the same step, all at once,
    and every stream would feel it.

    Args:
        executor: owns the memory.
        num_ahead: blocks beyond the highest used one that are kept ready.
    """

    def __init__(self, executor: Executor, num_ahead: int) -> None:
        self._executor = executor
        self._num_ahead = num_ahead
        self._num_touched = 0

    def forget(self) -> None:
        """The cache's memory is new."""
        self._num_touched = 0

    def after_step(self, num_used: int) -> None:
        """Touch the next block, if it is time.

        Args:
            num_used: blocks that have ever been used; they are the lowest ones.
        """
        block = max(self._num_touched, num_used)
        if 0 < num_used <= block < min(num_used + self._num_ahead, self._executor.num_blocks):
            self._executor.copy_blocks([(0, block)])  # what is in it does not matter
            self._num_touched = block + 1
