"""What a user may choose about calibration."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuserve.errors import InvalidRequestError
from fuserve.quantization.gptq import DAMPING
from fuserve.quantization.smoothquant import Smoothing, check_alpha


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How the numbers of a recipe are found.

    Attributes:
        num_samples: windows of the text that are run through the model.
        sample_tokens: tokens of each.
        seed: chooses the windows; equal seeds give equal files.
        smoothing: of SmoothQuant.
        damping: of GPTQ, as part of the mean of the Hessian's diagonal.
        act_order: GPTQ takes the columns with the largest inputs first.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    num_samples: int = 128
    sample_tokens: int = 256
    seed: int = 0
    smoothing: Smoothing = field(default_factory=Smoothing)
    damping: float = DAMPING
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.sample_tokens < 2:
            raise InvalidRequestError(
                f"calibration needs samples of at least 2 tokens; {self.num_samples} samples of "
                f"{self.sample_tokens} were asked for"
            )
        if not self.damping > 0:
            raise InvalidRequestError(f"damping is {self.damping}; it must be positive")
        check_alpha(self.smoothing.alpha)
        if self.smoothing.pieces < 1:
            raise InvalidRequestError(f"pieces is {self.smoothing.pieces}; at least 1 is needed")
