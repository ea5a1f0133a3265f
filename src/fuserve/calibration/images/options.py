"""How the numbers of a diffusion model's quantization are found."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.errors import InvalidRequestError
from fuserve.quantization.smoothquant import check_alpha


@dataclass(frozen=True, slots=True)
class ImageCalibrationOptions:
    """Options of calibration.

    Attributes:
        num_prompts: prompts that are painted, the first ones of the list.
        steps: of each; None takes what the model's scheduler is usually run with.
        guidance_scale: of each; at most 1 for models that are run without guidance.
        seed: of the first prompt's noise; the next one has the next.
        alpha: SmoothQuant's migration strength; None is 0.7 with int8 weights and searched for
            each layer of int4 weights. From 0 to 1.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    num_prompts: int = 8
    steps: int | None = None
    guidance_scale: float = 7.5
    seed: int = 0
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise InvalidRequestError(f"num_prompts={self.num_prompts} must be at least 1.")
        check_alpha(self.alpha)
