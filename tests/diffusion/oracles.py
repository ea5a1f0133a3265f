"""Small random models of diffusers and transformers, and their weights as programs want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fuserve.diffusion.program import Array, Program
from fuserve.diffusion.reference import ReferenceExecutor
from fuserve.diffusion.weights import ArrayWeights

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SDXL_UNET: dict[str, Any] = {
    **UNET,
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**UNET, "layers_per_block": 2},
    "sd21": {**UNET, "attention_head_dim": [2, 4, 8], "use_linear_projection": True},
    "sdxl": SDXL_UNET,
    "lcm": {**UNET, "time_cond_proj_dim": 16},
    "inpainting": {**UNET, "in_channels": 9},
    "uneven": {
        **UNET,
        "layers_per_block": [1, 2, 1],
        "block_out_channels": [24, 40, 64],
        "attention_head_dim": 2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": [16, 32, 32],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "bos_token_id": 598,
    "eos_token_id": 599,
    "pad_token_id": 599,
}


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model in eval mode, every parameter drawn anew, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def weights_of(model: torch.nn.Module) -> ArrayWeights:
    """The model's tensors by name."""
    state = model.state_dict()
    return ArrayWeights({name: tensor.float().numpy() for name, tensor in state.items()})


def nhwc(tensor: torch.Tensor) -> Array:
    """From torch's NCHW."""
    return tensor.detach().float().permute(0, 2, 3, 1).contiguous().numpy()


def run(program: Program, weights: ArrayWeights, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The program by the reference executor, in float64."""
    return ReferenceExecutor(program, weights, dtype=torch.float64).run(inputs)


def assert_close(ours: Array, theirs: Array, tolerance: float = 2e-6) -> None:
    """Equal to within a part of the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
