"""What ``fuserve eval compare --schemes`` names: models, and how to make those that are not there.

A scheme is a dtype (``float32``, ``float16``, ``bfloat16``), ``keep`` (the checkpoint as it is), a
name that ``--quantization`` or ``fuserve quantize`` knows, or a folder. Modifiers follow with
``+``: ``int4+g128``, ``int8+g0+float``, ``keep+kv-int8``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fuserve.errors import InvalidRequestError

Progress = Callable[[str, int, int], None]

DTYPES = ("float32", "float16", "bfloat16")
MODIFIERS: Mapping[str, Mapping[str, Any]] = {
    "g0": {"group_size": 0},
    "g32": {"group_size": 32},
    "g64": {"group_size": 64},
    "g128": {"group_size": 128},
    "symmetric": {"symmetric": True},
    "embeddings": {"quantize_embeddings": True},
    "float": {"activations": "float"},
    "kv-float32": {"kv_cache_dtype": "float32"},
    "kv-float16": {"kv_cache_dtype": "float16"},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-int4": {"kv_cache_dtype": "int4"},
}

OF_THE_RECIPE = ("group_size", "symmetric")
"""Options that a recipe has taken up when its folder is loaded."""

BASE: Mapping[str, Any] = {
    "dtype": "float32",
    "activations": "float",
    "kv_cache_dtype": "float32",
}
"""What all are compared with: weights, arithmetic and cache in fp32."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One scheme as it was named.

    Attributes:
        label: the name.
        folder: a quantized model to load instead of the base's.
        recipe: a recipe that must be calibrated into a folder first.
        options: keywords of ``ExecutorOptions`` that differ from what the user gave.
    """

    label: str
    folder: Path | None = None
    recipe: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_schemes(text: str) -> list[Scheme]:
    """The schemes of a list with commas.

    Raises:
        InvalidRequestError: a name or a modifier is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidRequestError("--schemes is empty; name some, such as int8,int4+g128,w8a8")
    return [_scheme(name) for name in dict.fromkeys(names)]


def _scheme(label: str) -> Scheme:
    from fuserve.quantization import RECIPES

    if "/" in label or Path(label).is_dir():
        return Scheme(label, folder=Path(label))
    name, *modifiers = label.split("+")
    options: dict[str, Any] = {}
    for modifier in modifiers:
        if modifier not in MODIFIERS:
            _refuse(label, modifier, MODIFIERS)
        options |= MODIFIERS[modifier]
    if name in DTYPES:
        return Scheme(label, options={"dtype": name} | options)
    if name == "keep":
        return Scheme(label, options=options)
    if name not in RECIPES:
        _refuse(label, name, (*DTYPES, "keep", *RECIPES))
    if RECIPES[name].needs_calibration:
        return Scheme(label, recipe=name, options=options)
    return Scheme(label, options={"quantization": name} | options)


def _refuse(label: str, part: str, known: Any) -> NoReturn:
    raise InvalidRequestError(
        f"--schemes: {part!r} in {label!r} is unknown; choose among {', '.join(known)}, or give "
        "the folder of a quantized model as a path with a slash"
    )


def calibrated_folder(model: str, scheme: Scheme, progress: Progress) -> Path:
    """The model quantized by a scheme's recipe, made once and kept in fuserve's cache.

    Raises:
        FuserveError: the model cannot be quantized so.
    """
    from fuserve.calibration import CalibrationOptions, quantize_model
    from fuserve.checkpoints import open_checkpoint
    from fuserve.decoder.packed_file import cache_folder
    from fuserve.quantization import LayerChoice, recipe_named

    assert scheme.recipe is not None
    checkpoint = open_checkpoint(model)
    group_size = scheme.options.get("group_size")
    recipe = recipe_named(scheme.recipe, group_size, scheme.options.get("symmetric"))
    key = hashlib.sha256(f"{checkpoint.content_key()} {recipe}".encode()).hexdigest()[:32]
    folder = cache_folder().parent / "quantized" / key
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        choice = LayerChoice.parse(recipe, [])
        quantize_model(checkpoint, folder, choice, CalibrationOptions(), progress=progress)
    return folder
