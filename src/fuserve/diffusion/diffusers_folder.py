"""Reading a diffusers folder: ``model_index.json`` and a folder for each part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuserve.architectures.fields import Fields
from fuserve.checkpoints.find import find_diffusion_model
from fuserve.checkpoints.json_file import read_json_object
from fuserve.checkpoints.safetensors_folder import StoredTensors, refuse_pickled_diffusion
from fuserve.diffusion.clip_tokenizer import ClipTokenizer
from fuserve.diffusion.parts import ModelParts, TextPart, UNetPart, VaePart
from fuserve.diffusion.quantized_layers import quantized_layers
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.vae_spec import tiny_vae_spec, vae_spec
from fuserve.diffusion.weights import CheckpointWeights, StoredName
from fuserve.errors import CheckpointError, UnsupportedModelError

_SD, _SDXL = "StableDiffusion", "StableDiffusionXL"
_PIPELINES = {
    f"{family}{task}Pipeline": family
    for family in (_SD, _SDXL)
    for task in ("", "Img2Img", "Inpaint")
} | {
    "LatentConsistencyModelPipeline": _SD,
    "LatentConsistencyModelImg2ImgPipeline": _SD,
}
_STEM = "diffusion_pytorch_model"
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Modules of an autoencoder's attention, and their names before diffusers 0.15."""

_TEXT_KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection")


def read_diffusers_folder(path: Path) -> ModelParts:
    """All parts of the model in a folder, opened and checked; no weight is read yet.

    Raises:
        CheckpointError: a file is missing or damaged, or holds pickled weights.
        UnsupportedModelError: a part or a field of a config is not supported; it is named.
    """
    index_file = path / "model_index.json"
    if not index_file.exists():
        raise CheckpointError(
            "has no model_index.json.",
            file=path,
            remedy="Give the folder that diffusers' save_pretrained wrote, or a single "
            ".safetensors file of Stable Diffusion 1.5 or XL.",
        )
    index = read_json_object(index_file)
    fields = Fields(index)
    family = fields.choice("_class_name", _PIPELINES)
    _kind(index, "unet", ("UNet2DConditionModel",))
    return ModelParts(
        path=path,
        unet=_read_unet(path / "unet"),
        vae=_read_vae(path / "vae", index),
        texts=_read_texts(path, index),
        penultimate=family == _SDXL,
        zero_empty_negative=family == _SDXL and fields.flag("force_zeros_for_empty_prompt", True),
        scheduler_config=read_json_object(path / "scheduler" / "scheduler_config.json"),
    )


def read_vae(model: str | Path) -> VaePart:
    """An autoencoder of its own folder or hub id, such as TAESD, to be used instead of a model's.

    Raises:
        ModelNotFoundError: there is no such folder.
        CheckpointError: as ``read_diffusers_folder``.
        UnsupportedModelError: likewise.
    """
    path = find_diffusion_model(model)
    kind = read_json_object(path / "config.json").get("_class_name")
    return _read_vae_of_kind(path, str(kind))


def _kind(index: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    """The class of a part in ``model_index.json``, ``[library, class]``; None where there is none.

    Raises:
        UnsupportedModelError: it is another than these.
    """
    entry = index.get(name)
    if entry is None or entry == [None, None]:
        return None
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if kind not in known:
        raise UnsupportedModelError(
            f"The field {name!r} of model_index.json is {str(kind)[:80]!r}. Supported: "
            f"{', '.join(map(repr, known))}."
        )
    return str(kind)


def _tensors(path: Path, stem: str) -> StoredTensors:
    if not path.is_dir():
        raise CheckpointError(
            "this part of the model is missing.",
            file=path,
            remedy="Fetch the whole model: model_index.json names its parts.",
        )
    return StoredTensors.of_folder(path, stem, refuse_pickled_diffusion)


def _read_unet(path: Path) -> UNetPart:
    stored, config = _tensors(path, _STEM), read_json_object(path / "config.json")
    spec = unet_spec(Fields(config, where="unet"))
    layers = quantized_layers(stored, config.get("quantization_config"))
    weights = CheckpointWeights(stored, layers=layers)
    return UNetPart(spec, weights)


def _read_vae(path: Path, index: Mapping[str, Any]) -> VaePart | None:
    kind = _kind(index, "vae", ("AutoencoderKL", "AutoencoderTiny"))
    return None if kind is None else _read_vae_of_kind(path, kind)


def _read_vae_of_kind(path: Path, kind: str) -> VaePart:
    stored = _tensors(path, _STEM)
    fields = Fields(read_json_object(path / "config.json"), where="vae")
    if kind == "AutoencoderTiny":
        return VaePart(tiny_vae_spec(fields), CheckpointWeights(stored))
    if kind != "AutoencoderKL":
        fields.refuse("_class_name", "'AutoencoderKL' or 'AutoencoderTiny'")
    return VaePart(vae_spec(fields), CheckpointWeights(stored, _old_names(stored)))


def _old_names(stored: StoredTensors) -> dict[str, StoredName]:
    """Where the attention's tensors lie in a checkpoint of before diffusers 0.15."""
    names = {}
    for side in ("encoder", "decoder"):
        attention = f"{side}.mid_block.attentions.0"
        for new, old in _OLD_ATTENTION.items():
            for end in ("weight", "bias"):
                if f"{attention}.{old}.{end}" in stored:
                    names[f"{attention}.{new}.{end}"] = StoredName(f"{attention}.{old}.{end}")
    return names


def _read_texts(path: Path, index: Mapping[str, Any]) -> tuple[TextPart, ...]:
    parts = []
    for end in ("", "_2"):
        kind = _kind(index, f"text_encoder{end}", _TEXT_KINDS)
        if kind is None:
            continue
        _kind(index, f"tokenizer{end}", ("CLIPTokenizer", "CLIPTokenizerFast"))
        parts.append(_read_text(path / f"text_encoder{end}", path / f"tokenizer{end}", kind))
    if not parts:
        raise UnsupportedModelError(
            "The field 'text_encoder' of model_index.json is missing. fuserve needs a text "
            "encoder, a CLIPTextModel."
        )
    return tuple(parts)


def _read_text(path: Path, tokenizer: Path, kind: str) -> TextPart:
    stored = _tensors(path, "model")
    config = Fields(read_json_object(path / "config.json"), where=path.name)
    spec = text_encoder_spec(config, projected=kind == "CLIPTextModelWithProjection")
    weights = CheckpointWeights(stored, _bare_names(stored))
    return TextPart(spec, weights, ClipTokenizer.load(tokenizer, spec.max_tokens))


def _bare_names(stored: StoredTensors) -> dict[str, StoredName]:
    """transformers 5 writes a ``CLIPTextModel`` without the prefix that all others have."""
    if "text_model.final_layer_norm.weight" in stored:
        return {}
    return {f"text_model.{name}": StoredName(name) for name in stored.tensor_names()}
