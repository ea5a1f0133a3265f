"""``CLIPTextModel`` and ``CLIPTextModelWithProjection`` as data (CLIP-L, OpenCLIP H and bigG)."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.architectures.fields import MAX_HEADS, MAX_VOCAB_SIZE, Fields
from fuserve.diffusion.config_fields import MAX_CHANNELS, MAX_LAYERS, require
from fuserve.diffusion.program import Activation

_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """A causal transformer over at most ``max_tokens`` tokens.

    Attributes:
        eos_token_id: the pooled state is that of its first place; None is that of the place with
            the highest id (configs of old said 2, which is no end of text).
        projection_channels: of the pooled state's projection, or None.
    """

    vocab_size: int
    max_tokens: int
    channels: int
    feed_forward_channels: int
    layers: int
    heads: int
    eps: float
    activation: Activation
    eos_token_id: int | None
    projection_channels: int | None


def text_encoder_spec(fields: Fields, *, projected: bool) -> TextEncoderSpec:
    """From the config of a ``CLIPTextModel``, or with ``projected`` of one with a projection.

    Absent fields have transformers' defaults.

    Raises:
        UnsupportedModelError: a field asks for what fuserve does not compute; it is named.
    """
    channels = fields.integer("hidden_size", 512, high=MAX_CHANNELS)
    heads = fields.integer("num_attention_heads", 8, high=MAX_HEADS)
    if channels % heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size, which is {channels}")
    require(fields, "use_attention_mask", False)
    eos = fields.integer("eos_token_id", 49407, low=0, high=MAX_VOCAB_SIZE)
    return TextEncoderSpec(
        vocab_size=fields.integer("vocab_size", 49408, high=MAX_VOCAB_SIZE),
        max_tokens=fields.integer("max_position_embeddings", 77, high=1 << 16),
        channels=channels,
        feed_forward_channels=fields.integer("intermediate_size", 2048, high=8 * MAX_CHANNELS),
        layers=fields.integer("num_hidden_layers", 12, high=MAX_LAYERS),
        heads=heads,
        eps=fields.number("layer_norm_eps", 1e-5, high=1.0),
        activation=fields.choice("hidden_act", _ACTIVATIONS, "quick_gelu"),
        eos_token_id=None if eos == 2 else eos,
        projection_channels=fields.integer("projection_dim", 512, high=MAX_CHANNELS)
        if projected
        else None,
    )
