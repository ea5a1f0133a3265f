"""Checkpoints: finding, checking and reading the files of a model.

Weights are memory-mapped and handed out tensor by tensor; nothing is unpickled, and every damage
is a ``CheckpointError`` that names file, tensor and remedy.
"""

from __future__ import annotations

from fuserve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fuserve.checkpoints.decode_stream import DecodeStream
from fuserve.checkpoints.dequantize import to_float32
from fuserve.checkpoints.tensor import Tensor
from fuserve.checkpoints.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "DecodeStream",
    "Tensor",
    "Tokenizer",
    "load_tokenizer",
    "open_checkpoint",
    "to_float32",
]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer and chat template of an opened checkpoint.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
        UnsupportedModelError: it is of a kind that fuserve does not know.
    """
    if checkpoint.format == "gguf":
        from fuserve.checkpoints.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(checkpoint.path, checkpoint.metadata)
    from fuserve.checkpoints.huggingface_tokenizer import huggingface_tokenizer

    return huggingface_tokenizer(checkpoint.path, checkpoint.metadata, checkpoint.generation_config)
