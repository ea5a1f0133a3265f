"""A model with the activation outliers that large language models grow.

From some billions of parameters on, a few hidden dimensions are 20 to 60 times as large as the
others in nearly all tokens (arXiv 2208.07339, section 4). Here they are planted: norms multiply
three dimensions by that much.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.calibration.small_models import write_tokenizer
from tests.parity.random_models import RandomModel, random_model

OUTLIERS = {7: 20.0, 64: 60.0, 101: 40.0}
"""Hidden dimension -> factor."""

CALM = 0.25
"""Shrinks the branches beside the residual, as training does; else any error is magnified."""

WIDTH = 128
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
}


def stress_model(folder: Path) -> RandomModel:
    """A random Llama with planted outliers, saved to ``folder``.

    What reads the outliers has smaller weights for them, so that they do not drown the others: an
    error in any dimension shows in the output.
    """
    built = random_model("llama", folder, seed=3, **SIZES)
    with torch.no_grad():
        for layer in built.model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight.abs() + 0.3)
            for linear in layer.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight *= CALM
            readers = (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
            )
            for dim, factor in OUTLIERS.items():
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[dim] *= factor
                for reader in readers:
                    reader.weight[:, dim] /= factor**0.5
    built.model.save_pretrained(folder)
    write_tokenizer(folder)
    return built
