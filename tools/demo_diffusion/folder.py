"""Writing the model as a folder of diffusers' Stable Diffusion pipeline, in f16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tools.demo_diffusion import network, tokenizer

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Write every part of the pipeline; what lies in ``folder`` already is overwritten."""
    tokenizer.write(folder / "tokenizer", network.MAX_TOKENS)
    for name, part in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        part.save_pretrained(folder / name)
        _forget_origin(folder / name / "config.json")
    _halve(folder / "vae" / "diffusion_pytorch_model.safetensors")
    _halve(folder / "unet" / "diffusion_pytorch_model.safetensors")
    # As every Stable Diffusion folder names them; transformers 5 would leave the prefix out.
    _halve(folder / "text_encoder" / "model.safetensors", prefix="text_model.")
    network.scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n", "utf-8")


def _forget_origin(file: Path) -> None:
    """Leave out where a part was loaded from: a path of the machine that trained it."""
    config = json.loads(file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _halve(file: Path, prefix: str = "") -> None:
    state = load_file(file)
    named = {prefix + name: weight.to(torch.float16).contiguous() for name, weight in state.items()}
    save_file(named, file, metadata={"format": "pt"})
