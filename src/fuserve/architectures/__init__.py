"""What a language model is: DecoderSpec, and the mapping of checkpoints to it, a file a family."""

from fuserve.architectures.alibi import alibi_slopes
from fuserve.architectures.families import (
    CONFIG_FAMILIES,
    GGUF_FAMILIES,
    spec_and_weight_map,
    spec_from_config,
)
from fuserve.architectures.rope import RopeTable, rope_frequencies, rope_rotations
from fuserve.architectures.shapes import num_parameters, tensor_shapes
from fuserve.architectures.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from fuserve.architectures.weight_map import PerHead, TensorSource

__all__ = [
    "CONFIG_FAMILIES",
    "GGUF_FAMILIES",
    "AttentionSpec",
    "DecoderSpec",
    "FeedForwardSpec",
    "LayerSpec",
    "NormSpec",
    "PerHead",
    "RopeScaling",
    "RopeSpec",
    "RopeTable",
    "TensorSource",
    "alibi_slopes",
    "num_parameters",
    "rope_frequencies",
    "rope_rotations",
    "spec_and_weight_map",
    "spec_from_config",
    "tensor_shapes",
]
