"""The parts of a text-to-image model: specs, weights and tokenizers, whatever the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuserve.diffusion.clip_tokenizer import ClipTokenizer
from fuserve.diffusion.quantized_layers import check_layers
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.text_encoder_spec import TextEncoderSpec
from fuserve.diffusion.unet_program import unet_programs
from fuserve.diffusion.unet_spec import UNetSpec
from fuserve.diffusion.vae_program import decoder_program
from fuserve.diffusion.vae_spec import TinyVaeSpec, VaeSpec
from fuserve.diffusion.weights import CheckpointWeights, check_weights
from fuserve.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class UNetPart:
    """The denoising network."""

    spec: UNetSpec
    weights: CheckpointWeights


@dataclass(frozen=True, slots=True)
class VaePart:
    """The autoencoder, of either kind."""

    spec: VaeSpec | TinyVaeSpec
    weights: CheckpointWeights


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text encoder with its tokenizer."""

    spec: TextEncoderSpec
    weights: CheckpointWeights
    tokenizer: ClipTokenizer


@dataclass(frozen=True, slots=True)
class ModelParts:
    """All of a model.

    Attributes:
        path: the folder or file it came from.
        vae: None where the network paints pixels itself.
        texts: one text encoder, or two whose hidden states stand side by side.
        penultimate: the text's hidden states are those before the last layer, without the last
            norm (SDXL).
        zero_empty_negative: an empty negative prompt is zeros, not the encoding of nothing (SDXL).
        scheduler_config: ``scheduler_config.json``.
    """

    path: Path
    unet: UNetPart
    vae: VaePart | None
    texts: tuple[TextPart, ...]
    penultimate: bool
    zero_empty_negative: bool
    scheduler_config: Mapping[str, Any]

    def with_vae(self, vae: VaePart) -> ModelParts:
        """The model with another autoencoder of the same latents.

        Raises:
            UnsupportedModelError: its latents have another number of channels.
        """
        own = self.unet.spec.out_channels if self.vae is None else self.vae.spec.latent_channels
        if vae.spec.latent_channels != own:
            raise UnsupportedModelError(
                f"The model's config field 'vae.latent_channels' is {vae.spec.latent_channels}. "
                f"Needed: the {own} of the model's own autoencoder."
            )
        return replace(self, vae=vae)

    def check(self) -> None:
        """Check that the parts fit each other, and every tensor its config, before any is read.

        Raises:
            UnsupportedModelError: naming the field at fault.
            CheckpointError: naming the tensor at fault.
        """
        unet = self.unet.spec
        text_channels = sum(part.spec.channels for part in self.texts)
        if text_channels != unet.text_channels:
            raise UnsupportedModelError(
                f"The model's config field 'unet.cross_attention_dim' is {unet.text_channels}. "
                f"Needed: {text_channels}, the sum of its text encoders' hidden_size."
            )
        if unet.text_time is not None:
            pooled = unet.text_time.in_channels - 6 * unet.text_time.time_dim
            if pooled != self.texts[-1].spec.projection_channels:
                raise UnsupportedModelError(
                    "The model's config field 'unet.projection_class_embeddings_input_dim' is "
                    f"{unet.text_time.in_channels}. Needed: the last text encoder's projection_dim "
                    f"and 6 x {unet.text_time.time_dim} features of sizes. SDXL's refiner is not "
                    "supported; use the base model."
                )
        check_weights(unet_programs(unet), self.unet.weights, self.unet.weights.path)
        check_layers(unet_programs(unet), self.unet.weights)
        if self.vae is not None:
            check_weights(
                (decoder_program(self.vae.spec, 1, 1, 1),), self.vae.weights, self.vae.weights.path
            )
        for part in self.texts:
            check_weights((text_encoder_program(part.spec, 1, 1),), part.weights, part.weights.path)
            for name, rows in (
                ("token_embedding", part.spec.vocab_size),
                ("position_embedding", part.spec.max_tokens),
            ):
                part.weights.require_shape(
                    f"text_model.embeddings.{name}.weight", (rows, part.spec.channels)
                )
            if part.spec.projection_channels is not None:
                part.weights.require_shape(
                    "text_projection.weight", (part.spec.projection_channels, part.spec.channels)
                )
