"""The diffusers folder that is written: the quantized denoiser, and copies of the other parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.calibration.images.layers import ChosenLayer
from fuserve.checkpoints.json_file import read_json_object
from fuserve.checkpoints.plain_name import is_plain_name
from fuserve.checkpoints.quantized.compressed_tensors import compressed_config, write_compressed
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.checkpoints.safetensors_writer import write_safetensors
from fuserve.errors import CheckpointError, InvalidRequestError
from fuserve.quantization import QuantizedLinear

UNET = "unet"
INDEX = "model_index.json"
SUFFIXES = (".json", ".txt", ".safetensors", ".model")
"""Files of a part that are copied; what is pickled is not."""

Array = npt.NDArray[np.generic]


class ImageOutput:
    """Writes the parts; ``model_index.json``, which makes the folder a model, comes last.

    Args:
        source: the folder of the float model.
        path: a new or empty folder.
        half: store what stays in float as float16.

    Raises:
        InvalidRequestError: the folder holds something.
        CheckpointError: the model's index names parts that are not in its folder.
    """

    def __init__(self, source: Path, path: Path, *, half: bool) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InvalidRequestError(f"{path}: is not an empty folder; choose a new one.")
        self._source, self._path, self._half = source, path, half
        self._index = _read_index(source / INDEX)

    def write_unet(
        self,
        stored: StoredTensors,
        layers: Sequence[ChosenLayer],
        rounded: Mapping[str, QuantizedLinear],
    ) -> None:
        """Write the denoiser: rounded layers by the names of their weights, the rest as it is."""
        arrays: dict[str, Array] = {}
        for name in stored.tensor_names():
            if name in rounded:
                shape = stored.shape(name)
                is_conv = len(shape) == 4
                module = name.removesuffix(".weight")
                arrays |= write_compressed(module, rounded[name], shape if is_conv else None)
            else:
                arrays[name] = self._kept(stored, name)
        folder = self._path / UNET
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", arrays)
        schemes = {
            name.removesuffix(".weight"): layer.scheme
            for layer in layers
            for name in layer.op.weight
        }
        kept = [
            name.removesuffix(".weight")
            for name in stored.tensor_names()
            if name.endswith(".weight") and len(stored.shape(name)) > 1 and name not in rounded
        ]
        quantization = compressed_config(schemes, kept, has_vectors=True, only_linears=False)
        config = read_json_object(self._source / UNET / "config.json")
        _write_json(folder / "config.json", config | {"quantization_config": quantization})

    def write_rest(self) -> None:
        """Copy the other parts that ``model_index.json`` names, then this itself."""
        for name in self._index:
            folder = self._source / name
            if name != UNET and not name.startswith("_") and folder.is_dir():
                self._copy_part(folder, self._path / name)
        for file in sorted(self._source.iterdir()):
            if file.is_file() and (file.name.startswith("LICENSE") or file.suffix == ".md"):
                shutil.copyfile(file, self._path / file.name)
        _write_json(self._path / INDEX, self._index)

    def _copy_part(self, source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for file in sorted(source.iterdir()):
            if not file.is_file() or file.suffix not in SUFFIXES:
                continue
            if self._half and file.suffix == ".safetensors":
                stored = StoredTensors.of_file(file)
                arrays = {name: self._kept(stored, name) for name in stored.tensor_names()}
                write_safetensors(target / file.name, arrays)
            else:
                shutil.copyfile(file, target / file.name)

    def _kept(self, stored: StoredTensors, name: str) -> Array:
        array: Array = np.asarray(stored.tensor(name).data)
        return array.astype(np.float16) if self._half and array.dtype == np.float32 else array


def _read_index(file: Path) -> Mapping[str, Any]:
    index = read_json_object(file)
    for name in index:
        if not is_plain_name(name):
            raise CheckpointError(
                f"names the part {name[:80]!r}, which is not a folder beside it.",
                file=file,
                remedy="Do not use this checkpoint unless you trust where it came from.",
            )
    return index


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
