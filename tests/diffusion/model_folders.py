"""Small diffusers folders with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.diffusion.oracles import SDXL_UNET, TEXT, UNET, VAE, randomized
from tests.diffusion.test_clip_tokenizer import write_vocabulary


def tokenizer(folder: Path, padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's with a small vocabulary."""
    write_vocabulary(folder)
    settings = {"pad_token": padding, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    """Of an encoder for this vocabulary."""
    ids = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextConfig(**{**TEXT, **ids, **changes})


def small_sd(folder: Path, **unet: Any) -> Any:
    """Stable Diffusion 1.5's parts, saved under ``folder / "model"``."""
    words = tokenizer(folder / "words")
    pipeline = StableDiffusionPipeline(
        vae=randomized(AutoencoderKL(**VAE), 1),
        text_encoder=randomized(CLIPTextModel(text_config(words)), 2),
        tokenizer=words,
        unet=randomized(UNet2DConditionModel(**{**UNET, **unet}), 3),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, folder)


def small_sdxl(folder: Path) -> Any:
    """SDXL's parts, saved under ``folder / "model"``."""
    words, second = tokenizer(folder / "words"), tokenizer(folder / "words_2", padding="!")
    first = text_config(words, hidden_size=12)
    last = text_config(second, hidden_act="gelu", projection_dim=16, hidden_size=12)
    pipeline = StableDiffusionXLPipeline(
        vae=randomized(AutoencoderKL(**VAE, scaling_factor=0.13025), 1),
        text_encoder=randomized(CLIPTextModel(first), 2),
        text_encoder_2=randomized(CLIPTextModelWithProjection(last), 3),
        tokenizer=words,
        tokenizer_2=second,
        unet=randomized(UNet2DConditionModel(**SDXL_UNET), 4),
        scheduler=DDIMScheduler(clip_sample=False),
        add_watermarker=False,
    )
    return saved(pipeline, folder)


def saved(pipeline: Any, folder: Path) -> Any:
    """The pipeline, written to ``folder / "model"``."""
    pipeline.save_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
