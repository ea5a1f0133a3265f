"""``AutoencoderKL`` and ``AutoencoderTiny`` as data, read from the config of a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.architectures.fields import Fields
from fuserve.diffusion.config_fields import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_GROUPS,
    require,
    sizes,
    texts,
)


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """An ``AutoencoderKL``.

    Attributes:
        image_channels: 3.
        channels: of the blocks, from the image inwards.
        layers: residual blocks of an encoder block; a decoder block has one more.
        scaling_factor: latents of the diffusion are ``(z - shift_factor) * scaling_factor``.
        quant_conv: a 1x1 convolution follows the encoder.
        post_quant_conv: a 1x1 convolution precedes the decoder.
    """

    image_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scaling_factor: float
    shift_factor: float

    @property
    def scale_factor(self) -> int:
        """Pixels of a side for each latent."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, slots=True)
class TinyVaeSpec:
    """An ``AutoencoderTiny`` (TAESD): residual blocks of three convolutions with ReLU, no norms.

    Attributes:
        encoder_blocks, decoder_blocks: residual blocks of each stage, in their order.
    """

    image_channels: int
    latent_channels: int
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scaling_factor: float
    shift_factor: float

    @property
    def scale_factor(self) -> int:
        """Pixels of a side for each latent."""
        return int(2 ** (len(self.decoder_blocks) - 1))


def vae_spec(fields: Fields) -> VaeSpec:
    """From the config of an ``AutoencoderKL``.

    Raises:
        UnsupportedModelError: a field asks for what fuserve does not compute; it is named.
    """
    channels = sizes(fields, "block_out_channels", (64,), high=MAX_CHANNELS)
    count = len(channels)
    for name, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if texts(fields, name, (kind,)) != (kind,) * count:
            fields.refuse(name, f"{count} times {kind!r}, once for each of block_out_channels")
    require(fields, "act_fn", "silu", "swish")
    require(fields, "latents_mean")
    require(fields, "latents_std")
    groups = fields.integer("norm_num_groups", 32, high=MAX_GROUPS)
    if any(one % groups for one in channels):
        fields.refuse("block_out_channels", f"multiples of norm_num_groups, which is {groups}")
    return VaeSpec(
        image_channels=_image_channels(fields),
        latent_channels=fields.integer("latent_channels", 4, high=MAX_CHANNELS),
        channels=channels,
        layers=fields.integer("layers_per_block", 1, high=MAX_BLOCKS),
        groups=groups,
        attention=fields.flag("mid_block_add_attention", True),
        quant_conv=fields.flag("use_quant_conv", True),
        post_quant_conv=fields.flag("use_post_quant_conv", True),
        scaling_factor=fields.number("scaling_factor", 0.18215),
        shift_factor=fields.number("shift_factor", 0.0, above=-1e6),
    )


def tiny_vae_spec(fields: Fields) -> TinyVaeSpec:
    """From the config of an ``AutoencoderTiny``.

    Raises:
        UnsupportedModelError: as for ``vae_spec``.
    """
    require(fields, "act_fn", "relu")
    require(fields, "upsample_fn", "nearest")
    require(fields, "upsampling_scaling_factor", 2)
    encoder_blocks = _counts(fields, "num_encoder_blocks", (1, 3, 3, 3))
    decoder_blocks = _counts(fields, "num_decoder_blocks", (3, 3, 3, 1))
    if len(encoder_blocks) != len(decoder_blocks):
        fields.refuse("num_decoder_blocks", f"{len(encoder_blocks)} stages, as the encoder has")
    channels = set()
    for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
        channels |= set(sizes(fields, name, (64, 64, 64, 64), high=MAX_CHANNELS))
        if len(channels) != 1:
            fields.refuse(name, "the same number of channels in all stages")
    return TinyVaeSpec(
        image_channels=_image_channels(fields),
        latent_channels=fields.integer("latent_channels", 4, high=MAX_CHANNELS),
        channels=channels.pop(),
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
        scaling_factor=fields.number("scaling_factor", 1.0),
        shift_factor=fields.number("shift_factor", 0.0, above=-1e6),
    )


def _image_channels(fields: Fields) -> int:
    for name in ("in_channels", "out_channels"):
        require(fields, name, 3)
    return 3


def _counts(fields: Fields, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return sizes(fields, name, default, high=MAX_BLOCKS)
