"""Links among ranks that ``torchrun`` has started, on any hosts, through ``torch.distributed``.

Commands go from rank 0 to each other rank, not through one another: a rank that computes would hold
up those behind it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from fuserve.decoder.step import StepBatch
from fuserve.errors import RankFailedError
from fuserve.parallel.attendance import Attendance
from fuserve.parallel.commands import Command, decode, encode
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.rendezvous import plain
from fuserve.parallel.slots import SlotSizes

Floats = npt.NDArray[np.float32]

_FOR_EVER = timedelta(days=3650)


class TorchControl:
    """What rank 0 says to the others, whenever it does: nobody waits too long for a command.

    All ranks make it together. While they start they exchange values, and nobody waits for one that
    is gone.

    Args:
        attendance: of the ranks.
        timeout_s: for an exchange, once all are there.
    """

    def __init__(self, attendance: Attendance, timeout_s: float) -> None:
        self.attendance = attendance
        self._group = dist.new_group(timeout=_FOR_EVER)
        self._meeting = dist.new_group(timeout=timedelta(seconds=timeout_s))
        self._sends = Sends(most=4 * dist.get_world_size())

    def broadcast(self, command: Command) -> None:
        """Send a command to all other ranks."""
        words = torch.from_numpy(encode(command))
        length = torch.tensor([len(words)], dtype=torch.int32)
        for rank in range(1, dist.get_world_size()):
            self._sends.start(length, rank, self._group)
            self._sends.start(words, rank, self._group)

    def receive(self) -> Command:
        """Wait for the next command. Raises RuntimeError when rank 0 has gone."""
        length = torch.empty(1, dtype=torch.int32)
        dist.recv(length, 0, group=self._group)
        words = torch.empty(int(length[0]), dtype=torch.int32)
        dist.recv(words, 0, group=self._group)
        return decode(words.numpy())

    def share(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """Rank 0's value, in all ranks; the others give None. Raises as ``exchange``."""
        values = self.exchange(value or {})
        return values[0]

    def exchange(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's value, in all ranks.

        Raises:
            RankFailedError: a rank does not come.
        """
        try:
            self.attendance.meet()
            return self._exchanged(json.dumps(value).encode())
        except RuntimeError as error:
            raise RankFailedError(
                f"a rank has gone while the group starts: {plain(error)}"
            ) from error

    def _exchanged(self, data: bytes) -> list[dict[str, Any]]:
        size = dist.get_world_size()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._meeting)
        longest = max(int(length[0]) for length in lengths)
        mine = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        all_data = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
        dist.all_gather(all_data, mine, group=self._meeting)
        return [json.loads(each.numpy().tobytes()) for each in all_data]

    def finish(self) -> None:
        """Wait until all that was sent has been received."""
        self._sends.finish()


class Sends:
    """Sends that go on in the background, in their order; only when there are too many, it waits.

    Args:
        most: at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def start(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        """Begin to send, and keep the tensor until it is sent."""
        while len(self._pending) >= self._most:
            self._pending.popleft()[0].wait()
        work = dist.isend(tensor, rank, group=group)
        assert work is not None, "this rank is in the group"
        self._pending.append((work, tensor))

    def finish(self) -> None:
        """Wait for all of them."""
        while self._pending:
            self._pending.popleft()[0].wait()


class TorchLinks:
    """Every rank's links; see ``LeaderLinks`` and ``WorkerLinks``.

    Args:
        layout: of the group.
        sizes: of what goes from stage to stage.
        control: made before.
    """

    def __init__(self, layout: GroupLayout, sizes: SlotSizes, control: TorchControl) -> None:
        rank = dist.get_rank()
        stage = layout.stage(rank)
        self._sizes = sizes
        self._control = control
        self._sends = Sends(most=layout.tensor_size * sizes.num_slots)
        self._leader_before = layout.rank(stage - 1, 0)
        self._last_leader = layout.last_leader
        self._next_stage: Iterable[int] = ()
        if stage + 1 < layout.num_stages:
            self._next_stage = layout.ranks_of(stage + 1)

    def broadcast(self, command: Command) -> None:
        """Send a command to all other ranks."""
        self._control.broadcast(command)

    def receive(self) -> Command:
        """Wait for the next command."""
        return self._control.receive()

    def send_hidden(self, number: int, hidden: Floats) -> None:
        """Hand the hidden states to the next stage."""
        for rank in self._next_stage:
            self._sends.start(torch.from_numpy(hidden), rank, None)

    def receive_hidden(self, number: int, num_tokens: int) -> Floats:
        """Wait for the hidden states of the stage before."""
        return _received(num_tokens, self._sizes.hidden_size, self._leader_before)

    def send_results(self, number: int, batch: StepBatch, logits: Floats) -> None:
        """Hand the results to rank 0."""
        for array in (logits, batch.hidden):
            if len(array):
                self._sends.start(torch.from_numpy(array), 0, None)

    def receive_results(self, number: int, batch: StepBatch) -> tuple[Floats, Floats]:
        """Wait for the last stage's logits and hidden states."""
        logits = _received(len(batch.logit_rows), self._sizes.vocab_size, self._last_leader)
        hidden = _received(len(batch.hidden_rows), self._sizes.hidden_size, self._last_leader)
        return logits, hidden


def _received(rows: int, columns: int, source: int) -> Floats:
    array = np.empty((rows, columns), np.float32)
    if rows:
        dist.recv(torch.from_numpy(array), source)
    return array
