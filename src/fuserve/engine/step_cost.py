"""StepCost: how long a step will take, learned from the steps that have run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to do.

    Attributes:
        num_decode_tokens: tokens of sequences that are generating, drafts included.
        num_context_tokens: tokens that those attend to, summed.
        num_prefill_tokens: tokens of prompts.
        num_prefill_pairs: (token, attended token) pairs of the prompts' chunks.
    """

    num_decode_tokens: int = 0
    num_context_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefill_pairs: int = 0


# In units that make the coefficients comparable: a step, a token, a thousand attended tokens,
# a prompt token, a thousand pairs.
_PRIOR_MS: Vector = np.array([50.0, 5.0, 5.0, 5.0, 2.0])
_DRIFT = 0.02  # share by which a coefficient may change from one step to the next
_NOISE = 0.05  # share by which equal steps differ
_NOISE_MS = 0.2
_OUTLIER = 3.0  # standard deviations; what lies beyond is another process, not the model


class StepCost:
    """A linear model of a step's time, kept current by a Kalman filter.

    Its five coefficients are the milliseconds of an empty step, a decoded token, the context it
    reads, a prompt token, and the pairs its attention goes through. Steps in use seldom tell all
    of them apart; the filter moves those that a step does tell of and leaves the others.
    """

    def __init__(self) -> None:
        self._ms: Vector = np.zeros(5)
        self._prior: Vector = _PRIOR_MS**2
        self._covariance: Vector = np.diag(self._prior)
        self._seen_decode = False
        self._seen_prefill = False

    @property
    def knows_mixed_steps(self) -> bool:
        """Whether decoding and prompts have both been seen."""
        return self._seen_decode and self._seen_prefill

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that has run."""
        x = _features(load)
        measured = seconds * 1e3
        gain = self._covariance @ x
        noise = (_NOISE * measured + _NOISE_MS) ** 2
        variance = float(x @ gain) + noise
        surprise = measured - float(x @ self._ms)
        limit = _OUTLIER * variance**0.5
        self._ms += gain * (min(max(surprise, -limit), limit) / variance)
        self._covariance -= np.outer(gain, gain) / variance
        self._covariance.flat[::6] += (_DRIFT * self._ms) ** 2 + 1e-12
        self._bound()
        self._seen_decode |= load.num_decode_tokens > 0
        self._seen_prefill |= load.num_prefill_tokens > 0

    def seconds(self, load: StepLoad) -> float:
        """Of a step with this load."""
        return float(_features(load) @ np.maximum(self._ms, 0.0)) * 1e-3

    def prefill_tokens(self, seconds: float, start: int) -> int:
        """Prompt tokens from position ``start`` on that add at most this time to a step."""
        if seconds <= 0:
            return 0
        slope, curve = self._prefill_ms(start)
        milliseconds = seconds * 1e3  # = slope * tokens + curve * tokens**2
        root = (slope * slope + 4 * curve * milliseconds) ** 0.5
        return int(2 * milliseconds / (slope + root))

    def prefill_seconds(self, start: int, num_tokens: int) -> float:
        """What so many prompt tokens from position ``start`` on add to a step."""
        slope, curve = self._prefill_ms(start)
        return (slope + curve * num_tokens) * num_tokens * 1e-3

    def _prefill_ms(self, start: int) -> tuple[float, float]:
        """Milliseconds of n tokens are ``slope * n + curve * n**2``."""
        per_token = max(float(self._ms[3]), 1e-4)
        per_pair = max(float(self._ms[4]), 0.0) * 1e-3
        return per_token + per_pair * start, per_pair / 2

    def _bound(self) -> None:
        """Keep what was not seen for long from becoming less certain than at the beginning."""
        excess = np.sqrt(np.maximum(self._covariance.diagonal() / self._prior, 1.0))
        self._covariance /= np.outer(excess, excess)


def _features(load: StepLoad) -> Vector:
    return np.array(
        (
            1.0,
            load.num_decode_tokens,
            load.num_context_tokens * 1e-3,
            load.num_prefill_tokens,
            load.num_prefill_pairs * 1e-3,
        )
    )
