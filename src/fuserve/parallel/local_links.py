"""Links among the ranks of one host: arrays in shared memory, and pipes to say that they are there.

Pipes wait without load, and end when their other end dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch
from fuserve.parallel.commands import Command, decode, encode
from fuserve.parallel.segment import Bytes
from fuserve.parallel.slots import SlotSizes

Floats = npt.NDArray[np.float32]


class HiddenSender:
    """A stage's way to the next one.

    Args:
        pipes: to each rank of it.
        memory: that they all see.
        sizes: of its slots.
    """

    def __init__(self, pipes: Sequence[Connection], memory: Bytes, sizes: SlotSizes) -> None:
        self._pipes = pipes
        self._memory = memory
        self._sizes = sizes

    def send(self, number: int, hidden: Floats) -> None:
        """Hand on the hidden states of a step  # [tokens, hidden]"""
        self._sizes.hidden(self._memory, number, len(hidden))[:] = hidden
        for pipe in self._pipes:
            _signal(pipe, number)


class LocalLeaderLinks:
    """Rank 0's links; see ``LeaderLinks``.

    Args:
        controls: to each other rank.
        sizes: of the slots.
        next_stage: None with one stage.
        results: pipe from the last stage and memory of its results; None with one stage.
    """

    def __init__(
        self,
        controls: Sequence[Connection],
        sizes: SlotSizes,
        next_stage: HiddenSender | None,
        results: tuple[Connection, Bytes] | None,
    ) -> None:
        self._controls = controls
        self._sizes = sizes
        self._next_stage = next_stage
        self._results = results

    def broadcast(self, command: Command) -> None:
        """Send a command to all other ranks."""
        data = encode(command).tobytes()
        for control in self._controls:
            control.send_bytes(data)

    def send_hidden(self, number: int, hidden: Floats) -> None:
        """Hand the hidden states to the second stage."""
        assert self._next_stage is not None
        self._next_stage.send(number, hidden)

    def receive_results(self, number: int, batch: StepBatch) -> tuple[Floats, Floats]:
        """Wait for the last stage's logits and hidden states."""
        assert self._results is not None
        pipe, memory = self._results
        _await(pipe, number)
        return self._sizes.results(memory, number, batch)

    def close(self) -> None:
        """Let go of the memory."""
        self._next_stage = self._results = None


class LocalWorkerLinks:
    """Another rank's links; see ``WorkerLinks``.

    Args:
        control: from rank 0.
        sizes: of the slots.
        stage_before: pipe from it and memory of its hidden states; None in the first stage.
        next_stage: None in the last stage, and in ranks that do not hand on.
        results: pipe and memory to rank 0; None but in the last stage's first rank.
    """

    def __init__(
        self,
        control: Connection,
        sizes: SlotSizes,
        stage_before: tuple[Connection, Bytes] | None,
        next_stage: HiddenSender | None,
        results: tuple[Connection, Bytes] | None,
    ) -> None:
        self._control = control
        self._sizes = sizes
        self._stage_before = stage_before
        self._next_stage = next_stage
        self._results = results

    def receive(self) -> Command:
        """Wait for the next command."""
        return decode(np.frombuffer(self._control.recv_bytes(), np.int32))

    def receive_hidden(self, number: int, num_tokens: int) -> Floats:
        """Wait for the hidden states of the stage before."""
        assert self._stage_before is not None
        pipe, memory = self._stage_before
        _await(pipe, number)
        return self._sizes.hidden(memory, number, num_tokens)

    def send_hidden(self, number: int, hidden: Floats) -> None:
        """Hand the hidden states to the next stage."""
        assert self._next_stage is not None
        self._next_stage.send(number, hidden)

    def send_results(self, number: int, batch: StepBatch, logits: Floats) -> None:
        """Hand the results to rank 0."""
        assert self._results is not None
        pipe, memory = self._results
        logits_slot, hidden_slot = self._sizes.results(memory, number, batch)
        logits_slot[:] = logits
        hidden_slot[:] = batch.hidden
        _signal(pipe, number)


def _signal(pipe: Connection, number: int) -> None:
    pipe.send_bytes(number.to_bytes(8, "little"))


def _await(pipe: Connection, number: int) -> None:
    come = int.from_bytes(pipe.recv_bytes(), "little")
    if come != number:
        raise RuntimeError(f"step {come} has come where step {number} was due")
