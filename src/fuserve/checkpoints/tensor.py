"""One tensor of a checkpoint, as it lies in the file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fuserve.quantization import QuantizedLinear

QUANTIZED = "QUANTIZED"
"""``Tensor.dtype`` of the weights of a quantized linear layer."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a tensor's stored bytes.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the stored type: ``F32``, ``F16``, ``BF16`` (as ``uint16``), a ggml block type
            such as ``Q4_0``, or ``QUANTIZED``.
        shape: logical shape, ``[out_features, in_features]`` for a linear weight.
        data: for plain dtypes an array of ``shape``; for block types ``uint8``
            ``[rows, bytes_per_row]``, each row quantized on its own; for ``QUANTIZED`` the codes.
        quantized: the whole layer, if it is ``QUANTIZED``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]
    quantized: QuantizedLinear | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows ``start:stop`` of the first dimension; no copy."""
        return self.take(slice(start, stop))

    def take(self, rows: slice | npt.NDArray[np.intp]) -> Tensor:
        """Some rows of the first dimension; a copy unless they are a slice."""
        data = self.data[rows]
        quantized = None if self.quantized is None else self.quantized.take(rows)
        shape = (len(data), *self.shape[1:])
        return replace(self, shape=shape, data=data, quantized=quantized)
