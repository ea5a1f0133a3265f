"""Autoencoders as programs: images to moments, latents to images.

Images are ``[-1, 1]`` in both directions, latents those of the autoencoder, not of the diffusion
(see ``VaeSpec.scaling_factor``).
"""

from __future__ import annotations

from fuserve.diffusion.program import Program, Slice, Value
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm
from fuserve.diffusion.vae_spec import TinyVaeSpec, VaeSpec

EPS = 1e-6
_BELOW_AND_RIGHT = (0, 0, 1, 1)


def decoder_program(spec: VaeSpec | TinyVaeSpec, images: int, height: int, width: int) -> Program:
    """The decoder of either kind of autoencoder; sizes are those of the latents."""
    if isinstance(spec, TinyVaeSpec):
        return tiny_decoder_program(spec, images, height, width)
    return vae_decoder_program(spec, images, height, width)


def encoder_program(spec: VaeSpec | TinyVaeSpec, images: int, height: int, width: int) -> Program:
    """The encoder of either kind of autoencoder; sizes are those of the images."""
    if isinstance(spec, TinyVaeSpec):
        return tiny_encoder_program(spec, images, height, width)
    return vae_encoder_program(spec, images, height, width)


def vae_decoder_program(spec: VaeSpec, images: int, height: int, width: int) -> Program:
    """``latents`` ``[images, height, width, C]`` to ``image``, ``scale_factor`` times as large."""
    build = ProgramBuilder()
    hidden = build.input("latents", images, height, width, spec.latent_channels)
    blocks = _VaeBlocks(spec, build)
    if spec.post_quant_conv:
        hidden = build.conv("post_quant_conv", hidden, spec.latent_channels, size=1)
    hidden = build.conv("decoder.conv_in", hidden, spec.channels[-1])
    hidden = blocks.middle("decoder.mid_block", hidden)
    last = len(spec.channels) - 1
    for index, channels in enumerate(reversed(spec.channels)):
        path = f"decoder.up_blocks.{index}"
        for layer in range(spec.layers + 1):
            hidden = blocks.resnet(f"{path}.resnets.{layer}", hidden, channels)
        if index < last:
            hidden = build.conv(f"{path}.upsamplers.0.conv", hidden, channels, upsample=True)
    norm = group_norm("decoder.conv_norm_out", spec.groups, EPS, silu=True)
    build.output("image", build.conv("decoder.conv_out", hidden, spec.image_channels, norm=norm))
    return build.finish()


def vae_encoder_program(spec: VaeSpec, images: int, height: int, width: int) -> Program:
    """``image`` to ``moments``: means, then log-variances  # [images, h, w, 2 C]."""
    build = ProgramBuilder()
    hidden = build.input("image", images, height, width, spec.image_channels)
    blocks = _VaeBlocks(spec, build)
    hidden = build.conv("encoder.conv_in", hidden, spec.channels[0])
    last = len(spec.channels) - 1
    for index, channels in enumerate(spec.channels):
        path = f"encoder.down_blocks.{index}"
        for layer in range(spec.layers):
            hidden = blocks.resnet(f"{path}.resnets.{layer}", hidden, channels)
        if index < last:
            hidden = build.conv(
                f"{path}.downsamplers.0.conv", hidden, channels, stride=2, padding=_BELOW_AND_RIGHT
            )
    hidden = blocks.middle("encoder.mid_block", hidden)
    norm = group_norm("encoder.conv_norm_out", spec.groups, EPS, silu=True)
    moments = build.conv("encoder.conv_out", hidden, 2 * spec.latent_channels, norm=norm)
    if spec.quant_conv:
        moments = build.conv("quant_conv", moments, 2 * spec.latent_channels, size=1)
    build.output("moments", moments)
    return build.finish()


def tiny_decoder_program(spec: TinyVaeSpec, images: int, height: int, width: int) -> Program:
    """``latents``, already through ``3 tanh(x / 3)``, to ``image``, which is in [0, 1] here."""
    build = ProgramBuilder()
    latents = build.input("latents", images, height, width, spec.latent_channels)
    hidden = build.conv("decoder.layers.0", latents, spec.channels, activation="relu")
    layer, last = 2, len(spec.decoder_blocks) - 1
    for stage, count in enumerate(spec.decoder_blocks):
        for _ in range(count):
            hidden = _tiny_block(build, f"decoder.layers.{layer}", hidden)
            layer += 1
        if stage < last:
            layer += 1  # the upsampling is a layer of its own there
            path = f"decoder.layers.{layer}"
            hidden = build.conv(path, hidden, spec.channels, bias=False, upsample=True)
            layer += 1
    build.output("image", build.conv(f"decoder.layers.{layer}", hidden, spec.image_channels))
    return build.finish()


def tiny_encoder_program(spec: TinyVaeSpec, images: int, height: int, width: int) -> Program:
    """``image``, which is in [0, 1] here, to ``moments``, the latents alone."""
    build = ProgramBuilder()
    hidden = build.input("image", images, height, width, spec.image_channels)
    layer = 0
    for stage, count in enumerate(spec.encoder_blocks):
        path = f"encoder.layers.{layer}"
        if stage == 0:
            hidden = build.conv(path, hidden, spec.channels)
        else:
            hidden = build.conv(path, hidden, spec.channels, stride=2, bias=False)
        layer += 1
        for _ in range(count):
            hidden = _tiny_block(build, f"encoder.layers.{layer}", hidden)
            layer += 1
    build.output("moments", build.conv(f"encoder.layers.{layer}", hidden, spec.latent_channels))
    return build.finish()


def _tiny_block(build: ProgramBuilder, path: str, source: Value) -> Value:
    channels = source.channels
    hidden = build.conv(f"{path}.conv.0", source, channels, activation="relu")
    hidden = build.conv(f"{path}.conv.2", hidden, channels, activation="relu")
    return build.conv(f"{path}.conv.4", hidden, channels, residual=source, activation="relu")


class _VaeBlocks:
    """The blocks that encoder and decoder share."""

    def __init__(self, spec: VaeSpec, build: ProgramBuilder) -> None:
        self._spec, self._build = spec, build

    def resnet(self, path: str, source: Value, channels: int) -> Value:
        build, groups = self._build, self._spec.groups
        norm = group_norm(f"{path}.norm1", groups, EPS, silu=True)
        hidden = build.conv(f"{path}.conv1", source, channels, norm=norm)
        residual = source
        if source.channels != channels:
            residual = build.conv(f"{path}.conv_shortcut", source, channels, size=1)
        norm = group_norm(f"{path}.norm2", groups, EPS, silu=True)
        return build.conv(f"{path}.conv2", hidden, channels, norm=norm, residual=residual)

    def middle(self, path: str, hidden: Value) -> Value:
        channels = hidden.channels
        hidden = self.resnet(f"{path}.resnets.0", hidden, channels)
        if self._spec.attention:
            hidden = self._attention(f"{path}.attentions.0", hidden)
        return self.resnet(f"{path}.resnets.1", hidden, channels)

    def _attention(self, path: str, image: Value) -> Value:
        build, channels = self._build, image.channels
        stack = (f"{path}.to_q", f"{path}.to_k", f"{path}.to_v")
        norm = group_norm(f"{path}.group_norm", self._spec.groups, EPS)
        qkv = build.conv(stack, image, 3 * channels, size=1, norm=norm)
        query, key, value = Slice(qkv), Slice(qkv, channels), Slice(qkv, 2 * channels)
        context = build.attention(path, query, key, value, 1, channels)
        return build.conv(f"{path}.to_out.0", context, channels, size=1, residual=image)
