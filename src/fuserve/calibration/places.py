"""The places of a layer whose inputs are quantized, and what stands before each.

A vector that the inputs of a place are divided by can be folded into what computes them: a norm,
the values' projection before the attention's output, the up projection before down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.architectures import DecoderSpec

Floats = npt.NDArray[np.float32]
Layer = dict[str, Floats]
"""Tensors of one layer by canonical name, without ``layers.{i}.``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Linear layers that read the same input.

    Attributes:
        name: "attn", "o", "ffn" or "down".
        linears: their canonical names, without ``layers.{i}.``.
        source: the tensor whose outputs are the inputs, feature by feature: a norm, or a linear
            layer; None where a non-linear function or a residual sum stands between.
        share: which output of ``source`` each input feature is; None if it is the same one.
    """

    name: str
    linears: tuple[str, ...]
    source: str | None
    share: npt.NDArray[np.intp] | None = None

    def fold_smoothing(self, layer: Layer, smoothing: Floats) -> bool:
        """Divide the inputs by ``smoothing``, their matrices' columns taking it up.

        Returns whether the division could be folded; else it must be done at run time.
        """
        for name in self.linears:
            layer[name] = layer[name] * smoothing
        if self.source is None:
            return False
        factors = np.reciprocal(self._of_source(smoothing))
        source = layer[self.source]
        layer[self.source] = source * (factors[:, None] if source.ndim == 2 else factors)
        if (bias := layer.get(f"{self.source}.bias")) is not None:
            layer[f"{self.source}.bias"] = bias * factors
        return True

    def fold_shift(self, layer: Layer, shift: Floats) -> bool:
        """Subtract ``shift`` from the inputs where the source has a bias that can take it up.

        Returns whether it could; else it must be done at run time. The outputs' share of the shift
        is not added here.
        """
        name = f"{self.source}.bias"
        # A linear layer's bias passes through attention unchanged, but not through a gate.
        if self.source == "up" or name not in layer:
            return False
        layer[name] = layer[name] - self._of_source(shift)
        return True

    def _of_source(self, per_input: Floats) -> Floats:
        """The vector's values in the order of the source's outputs."""
        if self.share is None:
            return per_input
        picked = np.empty(int(self.share.max()) + 1, np.float32)
        picked[self.share] = per_input
        return picked


def places_of(spec: DecoderSpec) -> tuple[Place, ...]:
    """The places of every layer, in the order in which vectors are to be folded.

    Down and output come first: folding them changes matrices that are smoothed afterwards.
    """
    feed_forward, attention = spec.feed_forward, spec.attention
    has_norm_before = spec.residual != "post"
    passes_scale = feed_forward.gated or feed_forward.activation == "relu"
    group = attention.num_heads // attention.num_kv_heads
    share = None
    if group > 1:
        heads = np.arange(attention.num_heads) // group
        share = (heads[:, None] * attention.head_dim + np.arange(attention.head_dim)).reshape(-1)
    ffn = ("gate", "up") if feed_forward.gated else ("up",)
    return (
        Place("down", ("down",), "up" if passes_scale else None),
        Place("o", ("o",), "v", share),
        Place("ffn", ffn, "ffn_norm" if has_norm_before else None),
        Place("attn", ("q", "k", "v"), "attn_norm" if has_norm_before else None),
    )
