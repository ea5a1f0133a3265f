"""The reference executor in ranks and stages says what it says whole, on any torch device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.communicator import tree_sum
from fuserve.decoder.reference import ReferenceExecutor
from fuserve.decoder.shard import Shard
from fuserve.decoder.weights import CheckpointWeights, DummyWeights
from fuserve.errors import InvalidRequestError
from tests.decoder.ranks import RankedExecutor, communicators
from tests.decoder.test_parts import small
from tests.parity.paging import NUM_BLOCKS, PagedSequences
from tests.parity.random_models import VARIANTS, random_model

FAMILIES = [
    "llama-biases-tied",
    "qwen3",
    "gemma2-caps",
    "gpt2-untied",
    "opt",
    "opt-post-norm",
    "bloom-power-of-two",
]
TOLERANCE = 1e-4  # of the standard deviation of the logits


class RankedReference(RankedExecutor):
    """Ranks and stages of the reference executor, on threads."""

    def __init__(
        self,
        weights: CheckpointWeights | DummyWeights,
        tensor_size: int,
        stage_starts: Sequence[int] = (0,),
        **given: object,
    ) -> None:
        self.spec = weights.spec
        self.num_blocks = NUM_BLOCKS
        self._pool = ThreadPoolExecutor(tensor_size)
        self.stages = []
        for first, end in zip(stage_starts, [*stage_starts[1:], None], strict=True):
            ends = communicators(tensor_size, weights.spec, shares_memory=False)
            self.stages.append(
                [
                    ReferenceExecutor(  # type: ignore[misc]
                        weights,
                        num_blocks=NUM_BLOCKS,
                        shard=Shard(rank, tensor_size, first, end),
                        communicator=ends[rank],
                        **given,  # type: ignore[arg-type]
                    )
                    for rank in range(tensor_size)
                ]
            )


def run(executor: object, vocab_size: int) -> tuple[np.ndarray, list[int]]:
    """Logits of two prompts, one of them in chunks, and of the greedy tokens after them."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, vocab_size - 3, size).tolist() for size in (40, 7)]
    sequences = PagedSequences(executor)  # type: ignore[arg-type]
    logits = [sequences.step({"a": prompts[0][:33]})["a"]]
    results = sequences.step({"a": prompts[0][33:], "b": prompts[1]})
    tokens: list[int] = []
    for _ in range(4):
        logits += [results["a"], results["b"]]
        chosen = {name: [int(rows[-1].argmax())] for name, rows in results.items()}
        tokens += [*chosen["a"], *chosen["b"]]
        results = sequences.step(chosen)
    return np.concatenate(logits), tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_and_stages_give_the_logits_and_tokens_of_one(name: str, tmp_path: Path) -> None:
    weights = CheckpointWeights(open_checkpoint(random_model(name, tmp_path).folder))
    longest = VARIANTS[name].max_model_len
    vocab_size = weights.spec.vocab_size
    whole = ReferenceExecutor(weights, num_blocks=NUM_BLOCKS, max_model_len=longest)
    logits, tokens = run(whole, vocab_size)
    for tensor_size, starts in ((2, (0,)), (1, (0, 1)), (2, (0, 1)), (4, (0,))):
        ranks = RankedReference(weights, tensor_size, starts, max_model_len=longest)
        theirs, their_tokens = run(ranks, vocab_size)
        assert their_tokens == tokens
        assert np.abs(theirs - logits).max() < TOLERANCE * logits.std()


def test_ranks_may_compute_in_other_types() -> None:
    weights = small()
    exact, _ = run(ReferenceExecutor(weights, num_blocks=NUM_BLOCKS), weights.spec.vocab_size)
    ranks = RankedReference(weights, 2, dtype=torch.bfloat16)
    rounded, _ = run(ranks, weights.spec.vocab_size)
    assert np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_a_shard_needs_the_communicator_of_its_rank() -> None:
    with pytest.raises(InvalidRequestError, match="rank 1 of 2"):
        ReferenceExecutor(small(), num_blocks=1, shard=Shard(1, 2))


class GlooCommunicator:
    """Ranks that are processes, over torch.distributed."""

    shared = None

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, array: np.ndarray) -> None:
        parts = [torch.empty(array.shape) for _ in range(self.size)]
        dist.all_gather(parts, torch.from_numpy(array))
        array[...] = tree_sum([part.numpy() for part in parts])

    def gather(self, parts: Sequence[np.ndarray]) -> None:
        for source in range(1, self.size):
            if self.rank == source:
                dist.send(torch.from_numpy(parts[source]), 0)
            elif self.rank == 0:
                dist.recv(torch.from_numpy(parts[source]), source)


class Rank0Tokens:
    """In rank 0 the executor itself; elsewhere one that takes the tokens that rank 0 chose."""

    def __init__(self, executor: ReferenceExecutor) -> None:
        self.spec, self.num_blocks = executor.spec, executor.num_blocks
        self._executor = executor

    def step(self, batch: object) -> np.ndarray:
        logits = torch.from_numpy(self._executor.step(batch))  # type: ignore[arg-type]
        if dist.get_rank() != 0:
            rows = len(batch.logit_rows)  # type: ignore[attr-defined]
            logits = torch.empty(rows, self.spec.vocab_size)
        dist.broadcast(logits, 0)
        return logits.numpy()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        weights = small()
        executor = ReferenceExecutor(
            weights, num_blocks=NUM_BLOCKS, shard=Shard(rank, 2), communicator=GlooCommunicator()
        )
        logits, tokens = run(Rank0Tokens(executor), weights.spec.vocab_size)
        if rank == 0:
            np.savez(f"{folder}/result.npz", logits=logits, tokens=tokens)
    finally:
        dist.destroy_process_group()


def test_two_processes_over_gloo_give_the_tokens_of_one(tmp_path: Path) -> None:
    weights = small()
    logits, tokens = run(ReferenceExecutor(weights, num_blocks=NUM_BLOCKS), weights.spec.vocab_size)
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    found = np.load(tmp_path / "result.npz")
    assert found["tokens"].tolist() == tokens
    assert np.abs(found["logits"] - logits).max() < TOLERANCE * logits.std()
