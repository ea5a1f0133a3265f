"""Reading single-file ``.safetensors`` checkpoints of Stable Diffusion 1.5 and SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuserve.architectures.fields import Fields
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.clip_tokenizer import ClipTokenizer
from fuserve.diffusion.parts import ModelParts, TextPart, UNetPart, VaePart
from fuserve.diffusion.program import Program
from fuserve.diffusion.single_file_names import (
    open_clip_names,
    stored_names,
    unet_modules,
    vae_modules,
)
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_program import unet_programs
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.vae_program import decoder_program, encoder_program
from fuserve.diffusion.vae_spec import vae_spec
from fuserve.diffusion.weights import CheckpointWeights, StoredName
from fuserve.errors import UnsupportedModelError

Config = Mapping[str, Any]

_UNET_PREFIX, _VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_UNET_INPUT = f"{_UNET_PREFIX}input_blocks.0.0.weight"
SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_CLIP_L: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "eos_token_id": 2,
}
_BIG_G: Config = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Family:
    """The configs of a family, which its files do not have, and where its text encoders lie.

    Attributes:
        clip: prefix of CLIP-L, which has transformers' names.
        open_clip: prefix of the second text encoder, or None.
    """

    unet: Config
    vae: Config
    texts: tuple[Config, ...]
    clip: str
    open_clip: str | None


SD15 = Family(
    unet={"cross_attention_dim": 768},
    vae=_VAE,
    texts=(_CLIP_L,),
    clip="cond_stage_model.transformer.",
    open_clip=None,
)
SDXL = Family(
    unet={
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "scaling_factor": 0.13025},
    texts=(_CLIP_L, _BIG_G),
    clip="conditioner.embedders.0.transformer.",
    open_clip="conditioner.embedders.1.model.",
)


def read_single_file(path: Path, tokenizer: Path) -> ModelParts:
    """All parts of the model in a file, opened; no weight is read yet.

    Args:
        path: a ``.safetensors`` file.
        tokenizer: a folder with CLIP's tokenizer, which these files do not have.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: it is of another family.
    """
    stored = StoredTensors.of_file(path)
    return parts_of(stored, family_of(stored), tokenizer)


def family_of(stored: StoredTensors) -> Family:
    """Which family a file is of, by the names in it. Raises UnsupportedModelError."""
    if _UNET_INPUT in stored:
        for family in (SDXL, SD15):
            clip = f"{family.clip}text_model.final_layer_norm.weight" in stored
            if clip and (
                family.open_clip is None or f"{family.open_clip}ln_final.weight" in stored
            ):
                return family
    raise UnsupportedModelError(
        f"{stored.path}: no single-file checkpoint of Stable Diffusion 1.5 or SDXL, with network, "
        "autoencoder and text encoders. Give other models as a diffusers folder; diffusers' "
        "from_single_file and save_pretrained make one of a file that it knows."
    )


def parts_of(stored: StoredTensors, family: Family, tokenizer: Path) -> ModelParts:
    """The parts of a file of this family."""
    # An inpainting model differs in what the first convolution reads.
    in_channels = stored.shape(_UNET_INPUT)[1:2]
    unet = unet_spec(Fields({**family.unet, "in_channels": in_channels[0]}, where="unet"))
    vae = vae_spec(Fields(family.vae, where="vae"))
    names = stored_names(_tensors(unet_programs(unet)), unet_modules(unet), _UNET_PREFIX)
    scale = vae.scale_factor
    vae_programs = (decoder_program(vae, 1, 1, 1), encoder_program(vae, 1, scale, scale))
    vae_names = stored_names(_tensors(vae_programs), vae_modules(vae), _VAE_PREFIX)
    prediction = {"prediction_type": "v_prediction"} if "v_pred" in stored else {}
    return ModelParts(
        path=stored.path,
        unet=UNetPart(unet, CheckpointWeights(stored, names)),
        vae=VaePart(vae, CheckpointWeights(stored, vae_names)),
        texts=_texts(stored, family, tokenizer),
        penultimate=family.open_clip is not None,
        zero_empty_negative=family.open_clip is not None,
        scheduler_config={**SCHEDULER, **prediction},
    )


def _texts(stored: StoredTensors, family: Family, tokenizer: Path) -> tuple[TextPart, ...]:
    spec = text_encoder_spec(Fields(family.texts[0], where="text_encoder"), projected=False)
    names = {
        name.removeprefix(family.clip): StoredName(name)
        for name in stored.tensor_names()
        if name.startswith(family.clip)
    }
    words = ClipTokenizer.load(tokenizer, spec.max_tokens)
    first = TextPart(spec, CheckpointWeights(stored, names), words)
    if family.open_clip is None:
        return (first,)
    spec = text_encoder_spec(Fields(family.texts[1], where="text_encoder_2"), projected=True)
    names = open_clip_names(spec, family.open_clip)
    return first, TextPart(spec, CheckpointWeights(stored, names), words.padded_with("!"))


def _tensors(programs: tuple[Program, ...]) -> set[str]:
    return {
        name for program in programs for _, names, _ in program.weight_shapes() for name in names
    }
