"""Processes that train together."""

from __future__ import annotations

import torch

from tools.demo_diffusion import ranks


def check_in_a_rank(count: int) -> None:
    assert ranks.count() == count
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for weight in weights:
        weight.grad = torch.arange(weight.numel()).view(weight.shape) + 10.0 * ranks.rank()
    ranks.average_gradients(weights)
    for weight in weights:
        wanted = torch.arange(weight.numel()).view(weight.shape) + 5.0
        assert torch.equal(weight.grad, wanted)
    gathered = ranks.gather(torch.tensor([ranks.rank()]))
    assert gathered.tolist() == [0, 1]


def test_ranks_average_their_gradients_and_gather_their_data() -> None:
    ranks.run(2, check_in_a_rank, 2)
