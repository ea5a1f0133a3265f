"""ERNIE 4.5, dense: Llama with rotated neighbours."""

from __future__ import annotations

from fuserve.architectures.fields import Fields
from fuserve.architectures.gguf import GgufModel, gguf_spec
from fuserve.architectures.huggingface import LLAMA_TENSORS, llama_like, with_prefix
from fuserve.architectures.rope_config import rope_from_config
from fuserve.architectures.spec import DecoderSpec
from fuserve.architectures.weight_map import TensorSource, map_tensors, stored_prefix


def spec_from_config(config: Fields) -> DecoderSpec:
    """ERNIE's config; ``use_bias`` is for all linear layers."""
    use_bias = config.flag("use_bias", False)
    return llama_like(
        config,
        "ernie4_5",
        qkv_bias=use_bias,
        output_bias=use_bias,
        ffn_bias=use_bias,
        tied_by_default=True,
        default_eps=1e-5,
        rope=lambda head_dim, max_position: rope_from_config(
            config, head_dim, max_position, default_base=500_000.0, interleaved=True
        ),
    )


def config_tensors(spec: DecoderSpec, names: frozenset[str]) -> dict[str, TensorSource]:
    """Llama's names; older files say ``ernie.`` for ``model.``."""
    prefix = stored_prefix(names, ("model.", "ernie.", ""), "embed_tokens.weight")
    return map_tensors(spec, with_prefix(prefix, LLAMA_TENSORS) | {"head": "lm_head"})


def spec_from_gguf(model: GgufModel) -> DecoderSpec:
    """Architecture ``ernie4_5``."""
    return gguf_spec(model, "ernie4_5", interleaved=True)
