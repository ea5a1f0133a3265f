"""The kinds of executors a model can run on."""

from __future__ import annotations

from collections.abc import Collection

from fuserve._native import ThreadPool
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.network import Backend, ExecutorMaker
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.packed_weights import PackedWeights, PackingOptions
from fuserve.diffusion.program import Executor, Program, Weights
from fuserve.diffusion.rank_executor import Gatherer, RankExecutor
from fuserve.kernels.machine import num_threads


def make_backend(
    options: DiffusionOptions, packing: PackingOptions, ranks: Gatherer | None = None
) -> Backend:
    """What makes executors, as the options say; native ones share threads and memory.

    Args:
        options: which and where.
        packing: how native ones keep weights.
        ranks: those that make each image of a denoiser together; native executors only. None: this
            process alone.

    Raises:
        InvalidRequestError: the number of threads is out of range.
    """
    if options.executor == "reference":
        return lambda weights: _ReferenceMaker(weights, options)
    workspace = NativeWorkspace(ThreadPool(num_threads(options.num_threads)))
    return lambda weights: _NativeMaker(weights, workspace, packing, ranks)


_IMAGES = ("latents", "feature")
"""Inputs of a denoiser that belong to the image."""


class _NativeMaker(ExecutorMaker):
    def __init__(
        self,
        weights: Weights,
        workspace: NativeWorkspace,
        packing: PackingOptions,
        ranks: Gatherer | None,
    ) -> None:
        self._workspace, self._ranks = workspace, ranks
        self._weights = PackedWeights(weights, workspace.pool, packing)

    def __call__(self, program: Program) -> Executor:
        images = [name for name in _IMAGES if name in program.inputs]
        if self._ranks is not None and images:
            return RankExecutor(program, images, self._weights, self._workspace, self._ranks)
        return NativeProgram(program, self._weights, self._workspace)

    def forget(self, names: Collection[str]) -> None:
        self._weights.forget(names)

    def release(self) -> None:
        self._workspace.release()


class _ReferenceMaker(ExecutorMaker):
    def __init__(self, weights: Weights, options: DiffusionOptions) -> None:
        self._weights, self._device = weights, options.device

    def __call__(self, program: Program) -> Executor:
        from fuserve.diffusion.reference import ReferenceExecutor

        return ReferenceExecutor(program, self._weights, device=self._device)

    def forget(self, names: Collection[str]) -> None:
        """It keeps nothing."""

    def release(self) -> None:
        """Likewise."""
