"""Rotary frequencies and rotations of a RopeSpec, all scalings.

Arithmetic is in float32 in the order of transformers' ``modeling_rope_utils``, because at long
positions one unit in the last place of a frequency is visible in the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.architectures.spec import RopeScaling, RopeSpec

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RopeTable:
    """What turns a position into rotations.

    Attributes:
        inv_freq: radians per position.  # [dim / 2]
        attention_factor: multiplies cosines and sines.
    """

    inv_freq: Floats
    attention_factor: float


def rope_frequencies(rope: RopeSpec, max_position: int) -> RopeTable:
    """Frequencies for sequences of up to ``max_position`` tokens.

    For dynamic NTK these hold up to the original length only; see :func:`rope_rotations`.
    """
    powers = _powers(rope.base, rope.dim)
    scaling = rope.scaling
    if scaling is None or scaling.kind == "dynamic":
        return RopeTable(np.float32(1.0) / powers, 1.0)
    if scaling.kind == "linear":
        return RopeTable(np.float32(1.0) / powers / np.float32(scaling.factor), 1.0)
    if scaling.kind == "llama3":
        return RopeTable(_llama3(np.float32(1.0) / powers, scaling), 1.0)
    if scaling.kind == "yarn":
        return RopeTable(_yarn(powers, rope, scaling), _yarn_attention_factor(scaling))
    is_long = max_position > scaling.original_max_position
    factors = np.array(scaling.long_factor if is_long else scaling.short_factor, np.float32)
    return RopeTable(np.float32(1.0) / (factors * powers), _longrope_attention_factor(scaling))


def rope_rotations(
    rope: RopeSpec, positions: npt.NDArray[np.integer], max_position: int
) -> tuple[Floats, Floats]:
    """Cosines and sines of ``positions``, attention factor included.  # [positions, dim / 2]

    ``max_position`` is the longest sequence that will be served; it decides between LongRoPE's
    two sets. A position's rotation never depends on the other positions of a step: under dynamic
    NTK, position ``p`` beyond the original length takes the base of a sequence of ``p + 1`` tokens.
    """
    table = rope_frequencies(rope, max_position)
    inv_freq = np.broadcast_to(table.inv_freq, (len(positions), rope.dim // 2))
    if rope.scaling is not None and rope.scaling.kind == "dynamic":
        inv_freq = _dynamic_ntk(rope, rope.scaling, positions, inv_freq)
    angles = positions.astype(np.float32)[:, None] * inv_freq
    factor = np.float32(table.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def _powers(base: float, dim: int) -> Floats:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.asarray(np.power(np.float64(base), exponents.astype(np.float64)), np.float32)


def _dynamic_ntk(
    rope: RopeSpec, scaling: RopeScaling, positions: npt.NDArray[np.integer], plain: Floats
) -> Floats:
    lengths = positions.astype(np.float64) + 1
    stretch = scaling.factor * lengths / scaling.original_max_position - (scaling.factor - 1)
    bases = rope.base * np.maximum(stretch, 1.0) ** (rope.dim / (rope.dim - 2))  # [positions]
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    powers = np.power(bases[:, None], exponents.astype(np.float64)).astype(np.float32)
    is_beyond = lengths > scaling.original_max_position
    inv_freq: Floats = np.where(is_beyond[:, None], np.float32(1.0) / powers, plain)
    return inv_freq


def _llama3(inv_freq: Floats, scaling: RopeScaling) -> Floats:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated."""
    low_freq_wavelen = scaling.original_max_position / scaling.low_freq_factor
    high_freq_wavelen = scaling.original_max_position / scaling.high_freq_factor
    wavelen = np.float32(2 * math.pi) / inv_freq
    stretched = inv_freq / np.float32(scaling.factor)
    smooth = (np.float32(scaling.original_max_position) / wavelen - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * stretched + smooth * inv_freq
    result = np.where(wavelen > low_freq_wavelen, stretched, between)
    return np.where(wavelen < high_freq_wavelen, inv_freq, result).astype(np.float32)


def _yarn(powers: Floats, rope: RopeSpec, scaling: RopeScaling) -> Floats:
    """YaRN (arXiv 2309.00071): interpolate slow features, extrapolate fast ones."""

    def feature_with(num_rotations: float) -> float:
        turns = scaling.original_max_position / (num_rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.base))

    low, high = feature_with(scaling.beta_fast), feature_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, rope.dim - 1.0)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    extrapolated = np.float32(1.0) / powers
    interpolated = np.float32(1.0) / (np.float32(scaling.factor) * powers)
    return np.asarray(interpolated * ramp + extrapolated * (1 - ramp), np.float32)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position))
