"""Step caching: between full steps the deep part of the network is not run; what it gave is reused.

Features deep in the network change little from one denoising step to the next: Ma et al.,
DeepCache (arXiv 2312.00858). A full step also gives the input of one residual block on the way
up; the steps after it compute only what lies above, on both sides, from the latents and their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fuserve.diffusion.program import Array, Attention, Conv, Linear, Program
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import UNetSpec


@dataclass(frozen=True, slots=True)
class StepCache:
    """When to reuse, and from where.

    Attributes:
        interval: every so many steps one is full.
        branch: the skip connection up to which every step is computed, counted from the latents:
            0, the first, leaves one residual block of the way up. A higher one costs more, and
            takes more of the new step into account.
    """

    interval: int
    branch: int


class CachedFeature:
    """The feature of one run of denoising: that of its last full step.

    Args:
        cache: when it is reused.
    """

    def __init__(self, cache: StepCache) -> None:
        self.branch = cache.branch
        self._interval = cache.interval
        self._feature: Array | None = None
        self._step = 0
        self._guided = False

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return 0 if self._feature is None else self._feature.nbytes

    def serves(self, step: int, guided: bool) -> bool:
        """Whether a step can do with it.

        The positive rows of guided pairs serve a step without guidance, but not the other way.
        """
        is_near = self._feature is not None and 0 < step - self._step < self._interval
        return is_near and (self._guided or not guided)

    def at(self, step: int, images: int, guided: bool) -> Array | None:
        """What a step takes over  # [rows, height, width, channels]; None: it must be full."""
        if self._feature is None or not self.serves(step, guided):
            return None
        feature = self._feature[1::2] if self._guided and not guided else self._feature
        return feature if len(feature) == images * (2 if guided else 1) else None

    def keep(self, feature: Array, step: int, guided: bool) -> None:
        """Take what a full step gave; rows are those of the text."""
        self._feature, self._step, self._guided = feature, step, guided


@lru_cache(maxsize=64)
def shallow_share(spec: UNetSpec, height: int, width: int, tokens: int, branch: int) -> float:
    """Part of a full step's multiplications that a step on a cached feature does.

    Args:
        spec: of the network.
        height: of the latents.
        width: of the latents.
        tokens: of the text.
        branch: as in ``StepCache``.
    """
    full = unet_program(spec, 1, 1, height, width, tokens=tokens)
    shallow = unet_program(
        spec, 1, 1, height, width, tokens=tokens, cache_branch=branch, is_shallow=True
    )
    return _multiplications(shallow) / _multiplications(full)


def _multiplications(program: Program) -> int:
    """Of convolutions taken directly, linears and attention."""
    total = 0
    for op in program.ops:
        places = op.out.batch * op.out.tokens * op.out.channels
        if isinstance(op, Conv):
            total += places * op.size**2 * sum(source.channels for source in op.sources)
        elif isinstance(op, Linear):
            total += places * op.source.channels * (2 if op.activation == "geglu" else 1)
        elif isinstance(op, Attention):
            total += 2 * places * op.key.value.tokens
    return total
