"""One network: its weights, and its programs for the sizes that were asked for lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from fuserve.diffusion.program import Array, Executor, Program, Weights

MakeExecutor = Callable[[Program], Executor]
Backend = Callable[[Weights], MakeExecutor]
"""Takes a network's weights, and makes executors that share them."""


class Network:
    """Runs programs over the same weights, whatever their size.

    Args:
        weights: of all its programs.
        backend: the kind of executor.
        num_programs: how many are kept ready; the one unused for longest goes first.
    """

    def __init__(self, weights: Weights, backend: Backend, num_programs: int) -> None:
        self._make = backend(weights)
        self._num_programs = num_programs
        self._executors: OrderedDict[Hashable, Executor] = OrderedDict()

    def run(
        self, key: Hashable, build: Callable[[], Program], inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the program of this key, which ``build`` writes when it is not ready."""
        executor = self._executors.pop(key, None) or self._make(build())
        self._executors[key] = executor
        while len(self._executors) > self._num_programs:
            self._executors.popitem(last=False)
        return executor.run(inputs)
