"""Weight quantization schemes as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage, WeightFormat

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Round-to-nearest weight quantization.

    Attributes:
        bits: 8 or 4.
        group_size: input features that share a scale; 0 is one scale per output channel.
        symmetric: int4 without zero points; int8 is always symmetric.
    """

    bits: Literal[4, 8]
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        allowed = GROUP_SIZES if self.bits == 4 else (0, *GROUP_SIZES)
        if self.group_size not in allowed:
            raise InvalidRequestError(
                f"group_size {self.group_size} is not supported for int{self.bits}; "
                f"choose one of {', '.join(map(str, allowed))}"
            )

    @classmethod
    def from_name(
        cls, name: Literal["int8", "int4"], group_size: int | None, symmetric: bool
    ) -> QuantScheme:
        """The scheme a user asks for by name.

        The defaults, int8 in groups of 128 and asymmetric int4 in groups of 64, keep a model at
        8.1 and 4.5 bits a weight.

        Raises:
            InvalidRequestError: the group size does not exist for the scheme.
        """
        if name == "int8":
            return cls(8, 128 if group_size is None else group_size)
        return cls(4, 64 if group_size is None else group_size, symmetric)

    @property
    def storage(self) -> Storage:
        """The packed format of the scheme."""
        if self.bits == 8:
            return Storage(WeightFormat.Q8, self.group_size)
        chosen = WeightFormat.Q4 if self.symmetric else WeightFormat.Q4_ASYMMETRIC
        return Storage(chosen, self.group_size)
