"""What is remembered of a linear layer's inputs during calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SAMPLE_ROWS = 512
"""Inputs that are kept as they are, for searches that must try a rounding out."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Statistics of the inputs that all layers of one place see.

    Attributes:
        count: rows seen.
        low: the least value of each feature.  # [in]
        high: the greatest.  # [in]
        mean_magnitude: mean of absolute values.  # [in]
        hessian: ``2 / count * X.T @ X``, None where no quantizer asks for it.  # [in, in]
        sample: some of the rows.  # [samples, in]
    """

    count: int
    low: Floats
    high: Floats
    mean_magnitude: Floats
    hessian: Floats | None
    sample: Floats

    @property
    def largest(self) -> Floats:
        """The largest magnitude of each feature.  # [in]"""
        return np.maximum(self.high, -self.low)

    def transformed(self, shift: Floats | None, smoothing: Floats | None) -> InputStatistics:
        """The statistics of ``(x - shift) / smoothing``.

        A shift needs statistics without a Hessian and makes the mean magnitude that of the sample:
        methods that shift use neither.
        """
        moved = self
        if shift is not None:
            assert self.hessian is None
            sample = self.sample - shift
            moved = replace(
                self,
                low=self.low - shift,
                high=self.high - shift,
                mean_magnitude=np.abs(sample).mean(axis=0),
                sample=sample,
            )
        if smoothing is None:
            return moved
        hessian = moved.hessian
        return InputStatistics(
            count=moved.count,
            low=moved.low / smoothing,
            high=moved.high / smoothing,
            mean_magnitude=moved.mean_magnitude / smoothing,
            hessian=None if hessian is None else hessian / smoothing / smoothing[:, None],
            sample=moved.sample / smoothing,
        )


class InputObserver:
    """Gathers :class:`InputStatistics` batch by batch.

    Args:
        num_features: features of the inputs.
        num_rows: rows that will come; the sample is taken at even distances among them.
        with_hessian: gather the Hessian, ``num_features ** 2`` floats.
        sample_rows: how many rows the sample has, about.
    """

    def __init__(
        self,
        num_features: int,
        num_rows: int,
        *,
        with_hessian: bool,
        sample_rows: int = SAMPLE_ROWS,
    ) -> None:
        self._low = np.full(num_features, np.inf, np.float32)
        self._high = np.full(num_features, -np.inf, np.float32)
        self._magnitudes = np.zeros(num_features, np.float64)
        self._hessian = np.zeros((num_features,) * 2, np.float32) if with_hessian else None
        # Rows come as lines of images or windows of a text, whose length is even as a rule. A step
        # that the length divides would take the same column, or the same tokens, of all of them.
        self._every = max(num_rows // sample_rows, 1) | 1
        self._samples: list[Floats] = []
        self._count = 0

    def add(self, rows: Floats) -> None:
        """Take inputs in.  # [rows, in]"""
        np.minimum(self._low, rows.min(axis=0), out=self._low)
        np.maximum(self._high, rows.max(axis=0), out=self._high)
        self._magnitudes += np.abs(rows).sum(axis=0, dtype=np.float64)
        if self._hessian is not None:
            self._hessian += rows.T @ rows
        first = -self._count % self._every
        self._samples.append(rows[first :: self._every].copy())
        self._count += len(rows)

    def result(self) -> InputStatistics:
        """The statistics of all rows so far, at least one."""
        hessian = self._hessian
        return InputStatistics(
            count=self._count,
            low=self._low,
            high=self._high,
            mean_magnitude=(self._magnitudes / self._count).astype(np.float32),
            hessian=None if hessian is None else hessian * np.float32(2.0 / self._count),
            sample=np.concatenate(self._samples),
        )
