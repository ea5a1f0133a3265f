"""LinearFilter: non-negative coefficients that drift, learned from one measurement at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_DRIFT = 0.02  # share by which a coefficient may change from one measurement to the next
_OUTLIER = 3.0  # standard deviations; what lies beyond is another process, not the model


class LinearFilter:
    """A Kalman filter for non-negative coefficients.

    Measurements in use seldom tell all coefficients apart. The filter moves those that one does
    tell of and leaves the others; what was not seen for long becomes uncertain, but never more
    than at the beginning.

    Args:
        prior: how large each coefficient may be.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior: Vector = np.array(prior) ** 2
        self._covariance: Vector = np.diag(self._prior)
        self._mean: Vector = np.zeros(len(prior))
        self.coefficients: list[float] = [0.0] * len(prior)

    def observe(self, features: Sequence[float], measured: float, noise: float) -> None:
        """Learn from a measurement that is ``coefficients @ features``, give or take ``noise``."""
        x = np.array(features)
        gain = self._covariance @ x
        variance = float(x @ gain) + noise * noise
        limit = _OUTLIER * variance**0.5
        surprise = min(max(measured - float(x @ self._mean), -limit), limit)
        self._mean += gain * (surprise / variance)
        self._covariance -= np.outer(gain, gain) / variance
        self._lift_negative()
        self.coefficients = self._mean.tolist()
        self._covariance.flat[:: len(x) + 1] += (_DRIFT * self._mean) ** 2 + 1e-12
        excess = np.sqrt(np.maximum(self._covariance.diagonal() / self._prior, 1.0))
        self._covariance /= np.outer(excess, excess)

    def _lift_negative(self) -> None:
        """Set negative coefficients to zero; the others make up for them as far as they can."""
        for _ in self.coefficients:
            lowest = int(self._mean.argmin())
            if self._mean[lowest] >= 0:
                return
            covariance = self._covariance[lowest]
            self._mean -= covariance * (self._mean[lowest] / covariance[lowest])
            self._mean[lowest] = 0.0
        np.maximum(self._mean, 0.0, out=self._mean)
