"""The numbers of one quantized linear layer, from a file or a quantizer to a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fuserve.kernels.linear import Codes
from fuserve.quantization.scheme import QuantScheme

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """What a quantized linear layer computes, with ``W`` the value of its codes:

    ``y = round_to_int8((x - input_shift) / input_smoothing) @ W.T + output_shift + bias``

    where the rounding is as ``scheme.activations`` says, and a vector that is None does nothing.
    Layers that read the same input (q, k and v; gate and up) have the same input vectors.

    Attributes:
        scheme: bits, groups and activations.
        codes: codes, scales, minimums, in ``Codes``' conventions; minimums also for asymmetric
            int8, whose codes then are unsigned: ``scale * code + minimum``.
        input_scale: step of int8 activations of one scale per tensor; None for other schemes.
        input_smoothing: divides the input (SmoothQuant).  # [in]
        input_shift: subtracted from the input (Outlier Suppression+).  # [in]
        output_shift: added to the output, as the shift's share of it.  # [out]
    """

    scheme: QuantScheme
    codes: Codes
    input_scale: float | None = None
    input_smoothing: Floats | None = None
    input_shift: Floats | None = None
    output_shift: Floats | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``[out_features, in_features]``."""
        rows, cols = self.codes.codes.shape
        return rows, cols

    def values(self) -> Floats:
        """The weights that the codes stand for, in the smoothed input's terms.  # [out, in]"""
        stored = self.codes
        if stored.minimums is not None:
            codes, offset = stored.codes.astype(np.float32), self._spread(stored.minimums)
        else:
            is_int8 = self.scheme.weight_bits == 8
            raw = stored.codes.view(np.int8) if is_int8 else stored.codes.astype(np.int8) - 8
            codes, offset = raw.astype(np.float32), None
        codes *= self._spread(stored.scales)
        if offset is not None:
            codes += offset
        return codes

    def take(self, rows: slice | npt.NDArray[np.intp]) -> QuantizedLinear:
        """The layer of some of its outputs."""
        stored = self.codes
        minimums = None if stored.minimums is None else stored.minimums[rows]
        shift = None if self.output_shift is None else self.output_shift[rows]
        codes = Codes(stored.codes[rows], stored.scales[rows], minimums)
        return replace(self, codes=codes, output_shift=shift)

    def _spread(self, per_group: Floats) -> Floats:
        """A value per group as one per feature  # [out, in] or [out, 1]"""
        if not self.scheme.group_size:
            return per_group
        return np.repeat(per_group, self.scheme.group_size, axis=1)[:, : self.shape[1]]
