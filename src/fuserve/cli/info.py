"""``fuserve info``: what a model is and what it needs, from its headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuserve.cli.flags import MODEL_HELP, Debug, Json
from fuserve.cli.output import human_bytes, print_facts, print_json
from fuserve.errors import CheckpointError

if TYPE_CHECKING:
    from fuserve.architectures import DecoderSpec
    from fuserve.checkpoints import Checkpoint
    from fuserve.decoder.weights import CheckpointWeights


def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's architecture, size and memory needs, without loading its weights."""
    from fuserve.checkpoints import open_checkpoint

    report = describe(model, open_checkpoint(model))
    if json:
        print_json(report)
    else:
        _print(report)


def describe(model: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything ``info`` shows, as plain data; sizes in bytes."""
    from fuserve.architectures import num_parameters
    from fuserve.decoder.weights import CheckpointWeights
    from fuserve.quantization import REGRIDDED

    weights = CheckpointWeights(checkpoint)
    spec = weights.spec
    names = checkpoint.tensor_names()
    dtypes = Counter(checkpoint.dtype(name) for name in names)
    file_bytes = sum(map(checkpoint.num_bytes, names))
    return {
        "model": model,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": _architecture(spec),
        "parameters": num_parameters(spec),
        "dtypes": dict(dtypes.most_common()),
        "regridded_dtypes": sorted(dtypes.keys() & REGRIDDED.keys()),
        "context_length": spec.max_position,
        "vocab_size": spec.vocab_size,
        "weight_bytes": _weight_bytes(weights, file_bytes),
        "kv_cache_bytes_per_1k_tokens": {
            dtype: _kv_bytes(spec, 1000, size) for dtype, size in (("float32", 4), ("float16", 2))
        },
        "tokenizer": _tokenizer(checkpoint),
    }


def _architecture(spec: DecoderSpec) -> dict[str, Any]:
    attention, feed_forward = spec.attention, spec.feed_forward
    windows = sorted({layer.sliding_window for layer in spec.layers if layer.sliding_window})
    rope = next((layer.rope for layer in spec.layers if layer.rope is not None), None)
    return {
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "feed_forward_size": feed_forward.size,
        "gated": feed_forward.gated,
        "activation": feed_forward.activation,
        "norm": spec.norm.kind,
        "residual": spec.residual,
        "rope_base": rope.base if rope else None,
        "rope_scaling": rope.scaling.kind if rope and rope.scaling else None,
        "sliding_windows": windows,
        "tied_head": spec.tied_head,
    }


def _weight_bytes(weights: CheckpointWeights, file_bytes: int) -> dict[str, int]:
    """In the file, and in memory in each format; the plan alone is made, nothing is read."""
    from fuserve.decoder.options import ExecutorOptions
    from fuserve.decoder.packed_file import packed_bytes
    from fuserve.decoder.storage_plan import plan_storage

    choices = {
        "as_stored": ExecutorOptions(),
        "int8": ExecutorOptions(quantization="int8"),
        "int8_with_embeddings": ExecutorOptions(quantization="int8", quantize_embeddings=True),
        "int4": ExecutorOptions(quantization="int4"),
        "int4_with_embeddings": ExecutorOptions(quantization="int4", quantize_embeddings=True),
    }
    sizes = {
        name: packed_bytes(plan_storage(weights, chosen)[0]) for name, chosen in choices.items()
    }
    return {"file": file_bytes, **sizes}


def _kv_bytes(spec: DecoderSpec, tokens: int, element_bytes: int) -> int:
    attention = spec.attention
    per_layer = 2 * attention.num_kv_heads * attention.head_dim * element_bytes
    return tokens * spec.num_layers * per_layer


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    from fuserve.checkpoints import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError as error:
        return {"found": False, "problem": str(error)}
    return {
        "found": True,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "chat_template": tokenizer.has_chat_template,
    }


def _print(report: dict[str, Any]) -> None:
    shape, weights = report["architecture"], report["weight_bytes"]
    kv_cache = report["kv_cache_bytes_per_1k_tokens"]
    print_facts(
        report["model"],
        {
            "file": f"{report['path']} ({report['format']})",
            "architecture": f"{shape['family']}: {shape['layers']} layers, hidden "
            f"{shape['hidden_size']}, {shape['heads']} heads, {shape['kv_heads']} KV heads of "
            f"{shape['head_dim']}, feed-forward {shape['feed_forward_size']} "
            f"{shape['activation']}{', gated' if shape['gated'] else ''}",
            "parameters": f"{report['parameters'] / 1e6:,.1f} M"
            + (", head tied to the embedding" if shape["tied_head"] else ""),
            "types": ", ".join(f"{count} x {name}" for name, count in report["dtypes"].items()),
            "context": f"{report['context_length']} tokens, vocabulary {report['vocab_size']}",
            "weights as stored": f"{human_bytes(weights['as_stored'])} in memory "
            f"({human_bytes(weights['file'])} in the file)",
            "weights in int8": _with_embeddings(weights, "int8"),
            "weights in int4": _with_embeddings(weights, "int4"),
            "KV cache": f"{human_bytes(kv_cache['float16'])} per 1000 tokens in float16, "
            f"{human_bytes(kv_cache['float32'])} in float32",
            "tokenizer": _tokenizer_text(report["tokenizer"]),
        },
    )
    if report["regridded_dtypes"]:
        kinds = ", ".join(report["regridded_dtypes"])
        print(
            f"Note: {kinds} weights are rounded again, to the nearest point of a grid of fuserve's "
            "own; Q8_0, Q4_0 and Q4_1 are kept without loss."
        )


def _with_embeddings(weights: dict[str, int], scheme: str) -> str:
    smaller = human_bytes(weights[f"{scheme}_with_embeddings"])
    return f"{human_bytes(weights[scheme])} in memory ({smaller} with --quantize-embeddings)"


def _tokenizer_text(tokenizer: dict[str, Any]) -> str:
    if not tokenizer["found"]:
        return f"none: {tokenizer['problem']}"
    template = "with" if tokenizer["chat_template"] else "no"
    return f"{tokenizer['vocab_size']} tokens, {template} chat template"
