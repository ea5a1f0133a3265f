"""One tensor of a checkpoint, as it lies in the file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a tensor's stored bytes.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the stored type: ``F32``, ``F16``, ``BF16`` (as ``uint16``), or a ggml block type
            such as ``Q4_0``.
        shape: logical shape, ``[out_features, in_features]`` for a linear weight.
        data: for plain dtypes an array of ``shape``; for block types ``uint8``
            ``[rows, bytes_per_row]``, each row quantized on its own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows ``start:stop`` of the first dimension; no copy."""
        return replace(self, shape=(stop - start, *self.shape[1:]), data=self.data[start:stop])
