"""Where the tensors of the parts lie in a single-file checkpoint, by its authors' names.

Each table goes from a module's path in diffusers to its path in the file; a module inside another
keeps its own name unless the table has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fuserve.diffusion.text_encoder_spec import TextEncoderSpec
from fuserve.diffusion.unet_spec import BlockSpec, UNetSpec
from fuserve.diffusion.vae_spec import VaeSpec
from fuserve.diffusion.weights import StoredName

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def stored_names(
    names: Iterable[str], modules: Mapping[str, str], prefix: str
) -> dict[str, StoredName]:
    """The place of each tensor, whose module is in the table or inside one that is."""
    return {name: StoredName(prefix + _renamed(name, modules)) for name in names}


def unet_modules(spec: UNetSpec) -> dict[str, str]:
    """Of the denoising network, without the file's prefix ``model.diffusion_model.``."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    index = 1
    for block in spec.down:
        for place in range(block.resnets):
            modules |= _step(block, place, f"input_blocks.{index}")
            index += 1
        if block.resampled:
            modules[f"{block.path}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    middle = spec.middle.path
    modules |= _resnet(f"{middle}.resnets.0", "middle_block.0")
    modules[f"{middle}.attentions.0"] = "middle_block.1"
    modules |= _resnet(f"{middle}.resnets.1", "middle_block.2")
    index = 0
    for block in spec.up:
        for place in range(block.resnets):
            modules |= _step(block, place, f"output_blocks.{index}")
            index += 1
        if block.resampled:
            place = 2 if block.transformer_layers else 1
            path = f"output_blocks.{index - 1}.{place}.conv"
            modules[f"{block.path}.upsamplers.0.conv"] = path
    return modules


def vae_modules(spec: VaeSpec) -> dict[str, str]:
    """Of the autoencoder, without the file's prefix ``first_stage_model.``."""
    modules = {
        "encoder.conv_norm_out": "encoder.norm_out",
        "decoder.conv_norm_out": "decoder.norm_out",
    }
    last = len(spec.channels) - 1
    for index in range(last + 1):
        down, up = f"encoder.down_blocks.{index}", f"decoder.up_blocks.{index}"
        old_down, old_up = f"encoder.down.{index}", f"decoder.up.{last - index}"
        for layer in range(spec.layers):
            modules |= _vae_resnet(f"{down}.resnets.{layer}", f"{old_down}.block.{layer}")
        for layer in range(spec.layers + 1):
            modules |= _vae_resnet(f"{up}.resnets.{layer}", f"{old_up}.block.{layer}")
        modules[f"{down}.downsamplers.0.conv"] = f"{old_down}.downsample.conv"
        modules[f"{up}.upsamplers.0.conv"] = f"{old_up}.upsample.conv"
    for side in ("encoder", "decoder"):
        for index in range(2):
            path = f"{side}.mid_block.resnets.{index}"
            modules |= _vae_resnet(path, f"{side}.mid.block_{index + 1}")
        for new, old in _VAE_ATTENTION.items():
            modules[f"{side}.mid_block.attentions.0.{new}"] = f"{side}.mid.attn_1.{old}"
    return modules


def open_clip_names(spec: TextEncoderSpec, prefix: str) -> dict[str, StoredName]:
    """Of a text encoder in OpenCLIP's names, which stores q, k and v as one matrix."""
    names = {
        "text_model.embeddings.position_embedding.weight": StoredName(
            f"{prefix}positional_embedding"
        ),
        "text_model.embeddings.token_embedding.weight": StoredName(
            f"{prefix}token_embedding.weight"
        ),
        "text_projection.weight": StoredName(f"{prefix}text_projection", transposed=True),
    }
    for end in ("weight", "bias"):
        final = f"text_model.final_layer_norm.{end}"
        names[final] = StoredName(f"{prefix}ln_final.{end}")
        for index in range(spec.layers):
            layer = f"text_model.encoder.layers.{index}"
            old = f"{prefix}transformer.resblocks.{index}"
            for part, letter in enumerate("qkv"):
                stacked = StoredName(f"{old}.attn.in_proj_{end}", part=(part, 3))
                names[f"{layer}.self_attn.{letter}_proj.{end}"] = stacked
            for module, old_module in _OPEN_CLIP_LAYER.items():
                names[f"{layer}.{module}.{end}"] = StoredName(f"{old}.{old_module}.{end}")
    return names


def _step(block: BlockSpec, place: int, old: str) -> dict[str, str]:
    """A residual block, and the transformer behind it where there is one."""
    modules = _resnet(f"{block.path}.resnets.{place}", f"{old}.0")
    if block.transformer_layers:
        modules[f"{block.path}.attentions.{place}"] = f"{old}.1"
    return modules


def _resnet(path: str, old: str) -> dict[str, str]:
    return {f"{path}.{new}": f"{old}.{before}" for new, before in _RESNET.items()}


def _vae_resnet(path: str, old: str) -> dict[str, str]:
    return {path: old, f"{path}.conv_shortcut": f"{old}.nin_shortcut"}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """The name with its longest leading module that the table has replaced."""
    stem, rest = name, ""
    while stem:
        if stem in modules:
            return modules[stem] + rest
        stem, dot, end = stem.rpartition(".")
        rest = f"{dot}{end}{rest}"
    return name
