"""Gaussian noise equal to that of torch's CPU generator, so that a seed means the same picture.

torch draws from the Mersenne twister (mt19937, which numpy has too) and turns pairs of uniform
numbers into normal ones by Box and Muller (Annals of Mathematical Statistics 29, 1958), eight pairs
at a time in float32, with logarithm, sine and cosine from the Cephes library. The functions here
repeat that arithmetic operation by operation, fused multiply-adds included, so the bits are those
of torch on any processor with AVX2. A multiply-add rounds twice here, first to float64, which can
show in one of 2^29 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuserve.errors import InvalidRequestError

FloatArray = NDArray[np.float32]

_SEED_BOUNDS = (-(2**63), 2**64)  # what torch.manual_seed takes
_PAIRS = 8  # torch pairs number i of a block of 16 with number i + 8


class NoiseGenerator:
    """A stream of normal numbers, as ``torch.Generator().manual_seed(seed)`` gives to ``randn``.

    Args:
        seed: an integer; as in torch, only its lowest 32 bits count.

    Raises:
        InvalidRequestError: the seed has more than 64 bits.
    """

    def __init__(self, seed: int) -> None:
        low, high = _SEED_BOUNDS
        if not low <= seed < high:
            raise InvalidRequestError(f"seed={seed} is not a 64-bit integer.")
        # numpy seeds by mt19937's own init_genrand, as torch does, in this class alone.
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits = np.random.MT19937()
        self._bits.state = state
        self._kept: float | None = None  # the second number of a pair drawn one by one

    def normal(self, shape: Sequence[int]) -> FloatArray:
        """Draw what ``torch.randn(shape, generator=...)`` would draw next, float32."""
        count = int(np.prod(shape))
        if count < 2 * _PAIRS:
            return np.array([self._one() for _ in range(count)], np.float32).reshape(shape)
        uniform = self._uniform(count)
        whole = count - count % (2 * _PAIRS)
        noise = np.empty(count, np.float32)
        noise[:whole] = _box_muller(uniform[:whole])
        if whole < count:  # torch draws the last 16 anew, over those already there
            noise[-2 * _PAIRS :] = _box_muller(self._uniform(2 * _PAIRS))
        return noise.reshape(shape)

    def _uniform(self, count: int) -> FloatArray:
        """Numbers in [0, 1) with 24 bits, one draw each."""
        raw = np.asarray(self._bits.random_raw(count)) & 0xFFFFFF
        return raw.astype(np.float32) * np.float32(2.0**-24)

    def _one(self) -> float:
        """A single number, for which torch computes in float64 and keeps the pair's second."""
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        raw = np.asarray(self._bits.random_raw(4)).tolist()
        turn, depth = (
            ((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (raw[:2], raw[2:])
        )
        radius = np.sqrt(-2.0 * np.log1p(-depth))
        self._kept = float(radius * np.sin(2.0 * np.pi * turn))
        return float(radius * np.cos(2.0 * np.pi * turn))


def image_noise(
    generators: Sequence[NoiseGenerator], height: int, width: int, channels: int
) -> FloatArray:
    """One image's noise from each generator, ``[images, height, width, channels]``.

    Drawn in the order channels, height, width, as diffusers draws it with a generator per image.
    """
    drawn = [generator.normal((channels, height, width)) for generator in generators]
    return np.ascontiguousarray(np.stack(drawn).transpose(0, 2, 3, 1))


def _box_muller(uniform: FloatArray) -> FloatArray:
    """Blocks of 16 uniform numbers to blocks of 16 normal ones, both flat."""
    blocks = uniform.reshape(-1, 2, _PAIRS)
    radius = np.sqrt(np.float32(-2.0) * _log(np.float32(1.0) - blocks[:, 0]))
    sine, cosine = _sine_cosine(np.float32(2.0 * np.pi) * blocks[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: FloatArray, b: FloatArray | np.float32 | float, c: FloatArray | float) -> FloatArray:
    """``a * b + c``, the product not rounded."""
    product = np.multiply(a, np.float32(b), dtype=np.float64)
    return (product + np.float32(c)).astype(np.float32)


_SQRT_HALF = np.float32(0.707106781186547524)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LOG2_LOW, _LOG2_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)


def _polynomial(x: FloatArray, coefficients: Sequence[float]) -> FloatArray:
    """By Horner's rule, highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _log(x: FloatArray) -> FloatArray:
    """Cephes' ``logf`` for normal positive numbers."""
    fraction, exponent = np.frexp(x)
    low = fraction < _SQRT_HALF
    t = (fraction - np.float32(1.0)) + np.where(low, fraction, np.float32(0.0))
    power = (exponent - low).astype(np.float32)
    square = t * t
    y = _fma(_polynomial(t, _LOG) * t, square, power * _LOG2_LOW)
    y = _fma(square, -0.5, y)
    return _fma(power, _LOG2_HIGH, t + y)


_FOUR_OVER_PI = np.float32(1.27323954473516)
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _sine_cosine(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Cephes' ``sinf`` and ``cosf`` for angles that are not negative."""
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    quarters = octant.astype(np.float32)
    for part in _QUARTER_PI:  # the angle less whole quarters, in three parts to lose no bits
        x = _fma(quarters, -part, x)
    square = x * x
    near_one = _polynomial(square, _COSINE) * square
    near_one = _fma(near_one, square, square * np.float32(-0.5)) + np.float32(1.0)
    near_zero = _fma(_polynomial(square, _SINE) * square, x, x)
    swapped = (octant & 2) != 0
    sine = np.where(swapped, near_one, near_zero)
    cosine = np.where(swapped, near_zero, near_one)
    sine = np.where(octant & 4, -sine, sine)
    return sine, np.where((octant - 2) & 4, cosine, -cosine)
