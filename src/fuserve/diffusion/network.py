"""One network: its weights, and its programs for the sizes that were asked for lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Protocol

from fuserve.diffusion.lora import Branches, with_branches
from fuserve.diffusion.program import Array, Executor, Program, Weights
from fuserve.diffusion.weights import ArrayWeights, OverlaidWeights


class ExecutorMaker(Protocol):
    """Makes executors that share the weights of a network."""

    def __call__(self, program: Program) -> Executor:
        """An executor of the program."""
        ...

    def forget(self, names: Collection[str]) -> None:
        """Let go of what was made of these tensors: no executor will use them again."""
        ...

    def release(self) -> None:
        """Give back the memory in which executors run; the next run takes what it needs."""
        ...


Backend = Callable[[Weights], ExecutorMaker]
"""Takes a network's weights."""


class Network:
    """Runs programs over the same weights, whatever their size.

    Args:
        weights: of all its programs.
        backend: the kind of executor.
        num_programs: how many are kept ready; the one unused for longest goes first.
    """

    def __init__(self, weights: Weights, backend: Backend, num_programs: int) -> None:
        self._weights = weights
        self._added: dict[str, Array] = {}  # tensors of LoRA branches
        self._make = backend(OverlaidWeights(ArrayWeights(self._added), weights))
        self._num_programs = num_programs
        self._executors: OrderedDict[Hashable, Executor] = OrderedDict()
        self._branches: Branches = {}

    def set_branches(self, branches: Branches) -> None:
        """Run with these LoRA branches from now on, instead of those there are."""
        if not branches and not self._branches:
            return
        self._branches = branches
        self._executors.clear()
        self._make.forget(self._added)
        self._added.clear()

    def run(
        self, key: Hashable, build: Callable[[], Program], inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the program of this key, which ``build`` writes when it is not ready."""
        executor = self._executors.pop(key, None) or self._make(self._branched(build()))
        self._executors[key] = executor
        while len(self._executors) > self._num_programs:
            self._executors.popitem(last=False)
        return executor.run(inputs)

    def release(self) -> None:
        """Give back the memory in which programs run; the next one takes what it needs."""
        self._make.release()

    def _branched(self, program: Program) -> Program:
        if self._branches:
            program, added = with_branches(program, self._branches, self._weights, "lora.")
            self._added.update(added)
        return program
