"""What rank 0 tells the others to do, as bytes: a line of JSON, then arrays of float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fuserve.diffusion.program import Array
from fuserve.diffusion.prompts import PromptEmbeds
from fuserve.diffusion.step_cache import StepCache


@dataclass(frozen=True, slots=True)
class Prepare:
    """Bind prompts, timesteps and a size; see ``DiffusionModel.denoiser``.

    Attributes:
        number: by which ``Predict`` names what is made.
        kept: numbers of earlier ones that are still wanted.
    """

    number: int
    kept: tuple[int, ...]
    positive: PromptEmbeds
    negative: PromptEmbeds | None
    timesteps: Array
    height: int
    width: int
    guidance_scale: float
    step_cache: StepCache | None = None


@dataclass(frozen=True, slots=True)
class Predict:
    """Take part in a step; see ``Denoiser.predict``."""

    number: int
    latents: Array
    step: int
    guided: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Give back the working memory; see ``DiffusionModel.release``."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave."""


Command = Prepare | Predict | Release | Stop


def encode(command: Command) -> bytes:
    """The command as bytes."""
    match command:
        case Prepare():
            fields = {
                "number": command.number,
                "kept": command.kept,
                "height": command.height,
                "width": command.width,
                "guidance_scale": command.guidance_scale,
                "step_cache": None if command.step_cache is None else asdict(command.step_cache),
            }
            arrays = {"timesteps": command.timesteps}
            for name, embeds in (("positive", command.positive), ("negative", command.negative)):
                if embeds is None:
                    continue
                fields[name] = embeds.keys
                arrays[f"{name}.hidden"] = embeds.hidden
                if embeds.pooled is not None:
                    arrays[f"{name}.pooled"] = embeds.pooled
            return _bytes("prepare", fields, arrays)
        case Predict():
            fields = {"number": command.number, "step": command.step, "guided": command.guided}
            return _bytes("predict", fields, {"latents": command.latents})
        case Release():
            return _bytes("release", {}, {})
        case Stop():
            return _bytes("stop", {}, {})


def decode(data: bytes) -> Command:
    """The command of these bytes.

    Raises:
        ValueError: they are none.
    """
    header, _, rest = data.partition(b"\n")
    values: dict[str, Any] = json.loads(header)
    kind, arrays = values.pop("kind"), _arrays(values.pop("arrays"), rest)
    match kind:
        case "prepare":
            keys = {name: values.pop(name, None) for name in ("positive", "negative")}
            positive, negative = (_embeds(name, keys[name], arrays) for name in keys)
            if positive is None:
                raise ValueError("a command prepares nothing")
            kept = tuple(values.pop("kept"))
            timesteps = arrays["timesteps"]
            cache = values.pop("step_cache")
            return Prepare(
                kept=kept,
                positive=positive,
                negative=negative,
                timesteps=timesteps,
                step_cache=None if cache is None else StepCache(**cache),
                **values,
            )
        case "predict":
            return Predict(latents=arrays["latents"], **values)
        case "release":
            return Release()
        case "stop":
            return Stop()
    raise ValueError(f"a command of unknown kind {kind!r}")


def _bytes(kind: str, fields: dict[str, Any], arrays: dict[str, Array]) -> bytes:
    shapes = [[name, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({"kind": kind, "arrays": shapes, **fields}).encode()
    parts = [np.ascontiguousarray(array, np.float32).tobytes() for array in arrays.values()]
    return b"".join([header, b"\n", *parts])


def _arrays(shapes: Sequence[tuple[str, Sequence[int]]], data: bytes) -> dict[str, Array]:
    sizes = [int(np.prod(shape)) for _, shape in shapes]
    if 4 * sum(sizes) != len(data):
        raise ValueError("a command has not the length that it says")
    floats = np.frombuffer(bytearray(data), np.float32)  # the kernels want what may be written
    parts = np.split(floats, np.cumsum(sizes))
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=False)}


def _embeds(name: str, keys: Any, arrays: dict[str, Array]) -> PromptEmbeds | None:
    if keys is None:
        return None
    return PromptEmbeds(arrays[f"{name}.hidden"], arrays.get(f"{name}.pooled"), tuple(keys))
