"""One tensor of a checkpoint, as it lies in the file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fuserve.quantization import QuantizedLinear, take_columns

QUANTIZED = "QUANTIZED"
"""``Tensor.dtype`` of the weights of a quantized linear layer."""

BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""(elements, bytes) of one block of each ggml block type."""


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

    def columns(self, first: int, stop: int) -> Tensor:
        """The features ``first:stop`` of the last dimension; no copy of a plain matrix.

        Raises:
            ValueError: a block type's blocks would be cut; see ``cuts_blocks``.
        """
        shape = (*self.shape[:-1], stop - first)
        if self.quantized is not None:
            layer = take_columns(self.quantized, first, stop)
            return replace(self, shape=shape, data=layer.codes.codes, quantized=layer)
        if self.dtype not in BLOCK_SIZES:
            return replace(self, shape=shape, data=self.data[..., first:stop])
        if self.cuts_blocks(first, stop):
            raise ValueError(f"features {first} to {stop} are no whole blocks of {self.dtype}")
        elements, num_bytes = BLOCK_SIZES[self.dtype]
        data = self.data[..., first // elements * num_bytes : stop // elements * num_bytes]
        return replace(self, shape=shape, data=np.ascontiguousarray(data))

    def cuts_blocks(self, first: int, stop: int) -> bool:
        """Whether ``first:stop`` are no whole blocks of a block type."""
        elements, _ = BLOCK_SIZES.get(self.dtype, (1, 1))
        return bool(first % elements or stop % elements)
