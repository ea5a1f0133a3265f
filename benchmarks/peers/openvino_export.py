"""Write a model's OpenVINO IR with random weights, compressed to int4 or int8.

Runs in OpenVINO's own environment: transformers builds the model from a config.json, optimum-intel
converts it, nncf compresses its weights. As in the random GGUF files, the embedding and the head
are compressed like every other layer.

    python openvino_export.py configs/llama-1b.json out_folder int4
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoConfig, AutoModelForCausalLM

COMPRESSION = {
    "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0, all_layers=True),
    "int8": OVWeightQuantizationConfig(bits=8, sym=True),
}


def main(config: str, folder: Path, weights: str) -> None:
    """Build, convert, compress, save."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(config), dtype=torch.float16
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as unconverted:
        model.save_pretrained(unconverted)
        del model
        converted = OVModelForCausalLM.from_pretrained(
            unconverted, export=True, compile=False, quantization_config=COMPRESSION[weights]
        )
        converted.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
