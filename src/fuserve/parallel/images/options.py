"""What a user may choose about the ranks that denoise an image together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fuserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class ImageParallelOptions:
    """How many ranks, and how long they may take. Both kinds together multiply.

    Attributes:
        cfg_parallel: 2: one half of the ranks computes what guidance needs of the negative prompt,
            the other that of the prompt.
        patch_parallel: ranks that have a band of the image each.
        step_timeout_s: a denoising step that takes longer has a rank that hangs.
        join_timeout_s: a rank that says nothing for so long while it starts has failed.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    cfg_parallel: int = 1
    patch_parallel: int = 1
    step_timeout_s: float = 600.0
    join_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.cfg_parallel not in (1, 2):
            raise InvalidRequestError(
                f"cfg_parallel must be 1 or 2: guidance has two halves; got {self.cfg_parallel}"
            )
        if self.patch_parallel < 1:
            raise InvalidRequestError(f"patch_parallel must be at least 1: {self.patch_parallel}")
        for name in ("step_timeout_s", "join_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.cfg_parallel * self.patch_parallel

    def half(self, rank: int) -> int:
        """0: the negative prompt's half of the ranks; 1: the prompt's. 0 where there are none."""
        return rank // self.patch_parallel

    def band_rank(self, rank: int) -> int:
        """The rank's number among those of its half, whose bands lie below each other."""
        return rank % self.patch_parallel

    def band_groups(self) -> list[list[int]]:
        """The ranks of each half, which exchange what bands need."""
        count = self.patch_parallel
        return [[half * count + band for band in range(count)] for half in range(self.cfg_parallel)]

    def half_groups(self) -> list[list[int]]:
        """The ranks that have the same band, one of each half."""
        return [list(group) for group in zip(*self.band_groups(), strict=True)]
