"""The model that is quantized: its tensors in float32, and where each goes in the new folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.architectures import DecoderSpec, TensorSource, spec_and_weight_map, tensor_shapes
from fuserve.architectures.huggingface_export import huggingface_config, separated_rows
from fuserve.checkpoints import Checkpoint, to_float32
from fuserve.decoder.weights import CheckpointWeights
from fuserve.errors import InvalidRequestError

Floats = npt.NDArray[np.float32]
PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checkpoint as transformers would lay it out.

    Attributes:
        checkpoint: what was opened.
        weights: its canonical tensors.
        spec: the decoder, rotated pairs where transformers has them.
        targets: where each canonical tensor is written.
        config: config.json of the folder to write, without quantization.
        float_dtype: the type of tensors that are written as floats.
    """

    checkpoint: Checkpoint
    weights: CheckpointWeights
    spec: DecoderSpec
    targets: Mapping[str, TensorSource]
    config: dict[str, Any]
    float_dtype: str

    def array(self, name: str) -> Floats:
        """Canonical tensor ``name``, a copy; the file's pages are let go."""
        values = np.array(to_float32(self.weights.tensor(name)), np.float32)
        self.weights.release(name)
        key = name.rsplit(".", 1)[-1] if not name.endswith(".bias") else name.split(".")[-2]
        is_moved = _is_interleaved(self.weights.spec) and not _is_interleaved(self.spec)
        if key in ("q", "k") and is_moved:
            attention = self.spec.attention
            heads = attention.num_heads if key == "q" else attention.num_kv_heads
            values = values[separated_rows(heads, attention.head_dim)]
        return values

    def names(self, layer: int | None) -> list[str]:
        """Canonical tensors of one layer, or all that belong to none."""
        prefix = None if layer is None else f"layers.{layer}."
        return [
            name
            for name in tensor_shapes(self.spec)
            if (name.startswith(prefix) if prefix else not name.startswith("layers."))
        ]


def open_source(checkpoint: Checkpoint) -> SourceModel:
    """Look at a checkpoint that is to be quantized.

    Raises:
        InvalidRequestError: it is quantized already.
        UnsupportedModelError: a GGUF of a family that cannot be written as a folder.
    """
    weights = CheckpointWeights(checkpoint)
    quantized = next((n for n in checkpoint.tensor_names() if checkpoint.scheme(n)), None)
    if quantized is not None:
        scheme = checkpoint.scheme(quantized)
        raise InvalidRequestError(
            f"{checkpoint.path}: is quantized already ({quantized} is "
            f"{scheme.describe() if scheme else ''}); quantize the original model."
        )
    if checkpoint.format == "huggingface":
        _, targets = spec_and_weight_map(
            "huggingface", checkpoint.metadata, checkpoint.tensor_names()
        )
        dtypes = {checkpoint.dtype(source.name) for source in targets.values()}
        float_dtype = next((one for one in ("BF16", "F16") if one in dtypes), "F32")
        config = dict(checkpoint.metadata)
        return SourceModel(checkpoint, weights, weights.spec, targets, config, float_dtype)
    spec = _separated(weights.spec)
    config = {**huggingface_config(spec), "dtype": "float16", **_token_ids(checkpoint.metadata)}
    _, targets = spec_and_weight_map("huggingface", config, ())
    return SourceModel(checkpoint, weights, spec, targets, config, "F16")


def _is_interleaved(spec: DecoderSpec) -> bool:
    return any(layer.rope is not None and layer.rope.interleaved for layer in spec.layers)


def _separated(spec: DecoderSpec) -> DecoderSpec:
    layers = tuple(
        replace(layer, rope=layer.rope and replace(layer.rope, interleaved=False))
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    ids = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "padding_token_id",
    }
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in ids.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}
