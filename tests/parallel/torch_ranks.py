"""A rank of a group that speaks torch.distributed; started by test_two_hosts, twice."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

from fuserve.decoder.communicator import tree_sum
from fuserve.parallel.commands import Copy, Step, Stop
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.slots import SlotSizes
from fuserve.parallel.torch_communicator import TorchCommunicator
from fuserve.parallel.torch_links import TorchControl, TorchLinks
from fuserve.parallel.torch_start import join_control
from tests.parallel.image_ranks import drawn, run_alone, run_as_rank, small_unet
from tests.parallel.test_parts import batch


def main() -> None:
    control = join_control(30.0, 60.0)
    rank = dist.get_rank()
    check_sums(rank)
    check_links(rank, control)
    check_image(rank)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is content")


def check_sums(rank: int) -> None:
    communicator = TorchCommunicator([0, 1], dist.new_group([0, 1]))
    parts = [np.random.default_rng(n).standard_normal((7, 33)).astype("f4") for n in range(2)]
    mine = parts[rank].copy()
    communicator.all_reduce(mine)
    assert np.array_equal(mine, tree_sum(parts))
    gathered = [
        part.copy() if n == rank else np.zeros((7, 33), "f4") for n, part in enumerate(parts)
    ]
    communicator.gather(gathered)
    if rank == 0:
        assert all(np.array_equal(a, b) for a, b in zip(gathered, parts, strict=True))
    uneven = [np.full(size, n if n == rank else -1, "f4") for n, size in enumerate((5, 0))]
    communicator.all_gather(uneven)
    assert (uneven[0] == 0).all()


def check_image(rank: int) -> None:
    """A guided step: of bands, and in halves."""
    torch.set_num_threads(1)
    communicator = TorchCommunicator([0, 1], dist.new_group([0, 1]))
    program, weights = small_unet("sd15", 1, 2, 12, 8)
    inputs = drawn(program)
    alone = run_alone(program, weights, inputs)["prediction"]
    in_bands = run_as_rank(program, weights, inputs, communicator)["prediction"]
    assert np.array_equal(in_bands, alone)
    half, _ = small_unet("sd15", 1, 1, 12, 8)
    own = {name: array if len(array) == 1 else array[[rank]] for name, array in inputs.items()}
    halves = [np.empty_like(alone[:1]) for _ in range(2)]
    halves[rank] = run_alone(half, weights, own)["prediction"]
    communicator.all_gather(halves)
    assert np.array_equal(np.concatenate(halves), alone)


def check_links(rank: int, control: TorchControl) -> None:
    """Two stages; three steps in flight before the first is finished."""
    sizes = SlotSizes(max_tokens=8, hidden_size=4, vocab_size=6, num_slots=4)
    links = TorchLinks(GroupLayout(1, (range(2), range(2, 4))), sizes, control)
    assert control.exchange({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert control.share({"from": "0"} if rank == 0 else None) == {"from": "0"}
    step = batch()
    if rank == 0:
        for number in range(3):
            links.broadcast(Copy(((number, number + 1),)))
            links.broadcast(Step(number, step))
            links.send_hidden(number, np.full((5, 4), number, np.float32))
        for number in range(3):
            logits, hidden = links.receive_results(number, step)
            assert logits.shape == (2, 6) and (logits == number * 2).all()
            assert hidden.shape == (1, 4) and (hidden == number * 3).all()
        links.broadcast(Stop())
        control.finish()
        return
    while not isinstance(command := links.receive(), Stop):
        if isinstance(command, Step):
            number = command.number
            hidden = links.receive_hidden(number, 5)
            assert (hidden == number).all()
            command.batch.hidden = np.full((1, 4), number * 3, np.float32)
            links.send_results(number, command.batch, np.full((2, 6), number * 2, np.float32))


if __name__ == "__main__":
    main()
    sys.exit(0)
