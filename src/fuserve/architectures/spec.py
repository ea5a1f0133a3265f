"""DecoderSpec: what a decoder-only language model is, as plain data.

A checkpoint's config is mapped to this spec by one file per family; the executors in
``fuserve.decoder`` run any spec. A new architecture is a new mapping, never new compute code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ResidualStyle = Literal["pre", "post", "sandwich"]
RopeScalingKind = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450)."""

    kind: NormKind
    eps: float
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the trained length.

    Only the fields of the given ``kind`` are meaningful; the names are those of the
    ``rope_scaling`` entry of Hugging Face configs.
    """

    kind: RopeScalingKind
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864).

    ``dim`` leading features of each head are rotated, the rest pass unchanged. ``interleaved``
    pairs features (2i, 2i+1); otherwise (i, i + dim/2).
    """

    dim: int
    base: float
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Multi-head or grouped-query attention. ``scale`` multiplies the scores."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None  # over head_dim, before RoPE
    score_softcap: float | None = None
    alibi: bool = False


@dataclass(frozen=True, slots=True)
class FeedForwardSpec:
    """``down(act(gate(x)) * up(x))`` if gated, else ``down(act(up(x)))``."""

    size: int
    gated: bool
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec | None
    sliding_window: int | None = None  # keys visible to a query, itself included


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer.

    ``residual``: "pre" normalizes the input of each half-layer; "post" normalizes after the
    residual sum; "sandwich" normalizes both the input and the output of each half-layer.
    ``learned_position_offset``: rows skipped in the learned position table (OPT has 2), None when
    positions are not learned.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    norm: NormSpec
    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    layers: tuple[LayerSpec, ...]
    residual: ResidualStyle = "pre"
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    learned_position_offset: int | None = None
    final_norm: bool = True
    logit_softcap: float | None = None
    head_bias: bool = False
    tied_head: bool = False

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)
