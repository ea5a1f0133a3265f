"""The kinds of executors a model can run on."""

from __future__ import annotations

from fuserve.diffusion.network import Backend, MakeExecutor
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.program import Executor, Program, Weights


def make_backend(options: DiffusionOptions) -> Backend:
    """What makes executors, as the options say.

    Raises:
        MissingExtraError: the reference executor is asked for, and torch is not installed.
    """
    return _reference_backend(options)


def _reference_backend(options: DiffusionOptions) -> Backend:
    from fuserve.diffusion.reference import ReferenceExecutor

    def backend(weights: Weights) -> MakeExecutor:
        def make(program: Program) -> Executor:
            return ReferenceExecutor(program, weights, device=options.device)

        return make

    return backend
