"""A Hugging Face model folder with safetensors weights, in one file or in shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from fuserve.checkpoints.json_file import read_json_object, read_json_object_if_there
from fuserve.checkpoints.layout import TensorLayout, missing_tensor
from fuserve.checkpoints.mapped_file import MappedFile
from fuserve.checkpoints.plain_name import is_plain_name
from fuserve.checkpoints.safetensors_header import read_safetensors_header
from fuserve.checkpoints.tensor import Tensor
from fuserve.errors import CheckpointError
from fuserve.quantization import QuantScheme

_STEM = "model"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class StoredTensors:
    """The tensors of one or several safetensors files, mapped.

    Args:
        path: the folder or the file, for messages.
        places: the file of each tensor, and its place there.
    """

    def __init__(self, path: Path, places: dict[str, tuple[MappedFile, TensorLayout]]) -> None:
        self.path = path
        self._places = places

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """All tensors of one file, whose header is read and checked."""
        file = MappedFile(path)
        layouts, _ = read_safetensors_header(file)
        return cls(path, {name: (file, layout) for name, layout in layouts.items()})

    @classmethod
    def of_folder(
        cls, path: Path, stem: str, refuse_pickles: Callable[[Path], CheckpointError]
    ) -> Self:
        """All tensors of ``stem.safetensors``, or of the shards that its index names."""
        index = path / f"{stem}.safetensors.index.json"
        if index.exists():
            return cls(path, _open_shards(path, index))
        stored = cls.of_file(_single_file(path, stem, refuse_pickles))
        stored.path = path
        return stored

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the files."""
        return tuple(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return self._place(name)[1].shape

    def dtype(self, name: str) -> str:
        """Stored type of a tensor."""
        return self._place(name)[1].dtype

    def num_bytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        layout = self._place(name)[1]
        return layout.stop - layout.start

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped bytes."""
        file, layout = self._place(name)
        return layout.read(file)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        file, layout = self._place(name)
        file.release(layout.start, layout.stop)

    def _place(self, name: str) -> tuple[MappedFile, TensorLayout]:
        try:
            return self._places[name]
        except KeyError:
            raise missing_tensor(name, self._places, self.path) from None


class SafetensorsFolder(StoredTensors):
    """See ``Checkpoint``. Headers of all files are read and checked when the folder is opened."""

    format: Literal["huggingface"] = "huggingface"

    def __init__(self, path: Path) -> None:
        config = path / "config.json"
        if not config.exists():
            raise CheckpointError(
                "has no config.json.",
                file=path,
                remedy="Give the folder that transformers' save_pretrained wrote, a .gguf file, or "
                "owner/name/file.gguf for a GGUF on the hub.",
            )
        self.metadata: dict[str, Any] = read_json_object(config)
        self.generation_config: dict[str, Any] = read_json_object_if_there(
            path / "generation_config.json"
        )
        super().__init__(path, StoredTensors.of_folder(path, _STEM, refuse_pickle)._places)

    def scheme(self, name: str) -> QuantScheme | None:
        """None: tensors are handed out as they are stored."""
        return None

    def vectors(self, name: str) -> frozenset[str]:
        """Empty, as no tensor has a scheme."""
        return frozenset()

    def content_key(self) -> str:
        """Digest of the config, and of each file's size, header and samples of every tensor."""
        return self._content_key

    @cached_property
    def _content_key(self) -> str:
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        ranges: dict[MappedFile, list[tuple[int, int]]] = {}
        for file, layout in self._places.values():
            ranges.setdefault(file, []).append((layout.start, layout.stop))
        for file in sorted(ranges, key=lambda one: one.path.name):
            header_bytes = 8 + int.from_bytes(file.map[:8], "little")
            digest.update(file.size.to_bytes(8, "little"))
            digest.update(file.map[:header_bytes])
            for sample in file.samples(ranges[file]):
                digest.update(sample)
        return digest.hexdigest()


def _single_file(
    folder: Path, stem: str, refuse_pickles: Callable[[Path], CheckpointError]
) -> Path:
    single = folder / f"{stem}.safetensors"
    index = f"{stem}.safetensors.index.json"
    if single.exists():
        return single
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(
            f"has {len(others)} safetensors files, but neither {single.name} nor {index}.",
            file=folder,
            remedy=f"Fetch {index} too; it says which tensor is in which file.",
        )
    pickles = sorted(one for one in folder.iterdir() if one.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise refuse_pickles(pickles[0])
    raise CheckpointError(
        f"has no weights: neither {single.name} nor {index} is there.",
        file=folder,
        remedy="Fetch the *.safetensors files of the model into this folder; where it has only "
        ".bin files, convert them with transformers' save_pretrained.",
    )


def refuse_pickle(file: Path) -> CheckpointError:
    """The error for weights in Python pickles, which can run code when they are read."""
    folder, target = file.parent, f"{file.parent.resolve().name}-safetensors"
    return CheckpointError(
        "holds pickled weights. Reading a pickle can run any code, so fuserve never does.",
        file=file,
        remedy='Convert a model you trust with: python -c "from transformers import '
        "AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained('{folder}').save_pretrained('{target}'); "
        f"T.from_pretrained('{folder}').save_pretrained('{target}')\" "
        f"and give the folder {target}.",
    )


def refuse_pickled_diffusion(path: Path) -> CheckpointError:
    """The error for a diffusion model's weights in Python pickles; see ``refuse_pickle``."""
    return CheckpointError(
        "holds pickled weights. Reading a pickle can run any code, so fuserve never does.",
        file=path,
        remedy="Use the model's .safetensors files. Convert a model you trust with diffusers: "
        "DiffusionPipeline.from_pretrained(...).save_pretrained(...), or from_single_file for a "
        ".ckpt.",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each a plain name within the folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "has no weight_map from tensor names to files.",
            file=index,
            remedy="Fetch the index again.",
        )
    for name, shard in weight_map.items():
        if not (is_plain_name(shard) and shard.endswith(".safetensors")):
            raise CheckpointError(
                f"is said to lie in {str(shard)[:80]!r}, which is not a *.safetensors file of "
                "this folder.",
                file=index,
                tensor=name,
                remedy="Do not use this checkpoint unless you trust where it came from.",
            )
    return weight_map


def _open_shards(folder: Path, index: Path) -> dict[str, tuple[MappedFile, TensorLayout]]:
    weight_map = _read_index(index)
    places: dict[str, tuple[MappedFile, TensorLayout]] = {}
    opened: dict[str, tuple[MappedFile, dict[str, TensorLayout]]] = {}
    for name, shard in weight_map.items():
        if shard not in opened:
            path = folder / shard
            if not path.exists():
                missing = sorted(
                    other for other in set(weight_map.values()) if not (folder / other).exists()
                )
                raise CheckpointError(
                    f"{len(missing)} of the files that {index.name} names are missing: "
                    f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}.",
                    file=path,
                    tensor=name,
                    remedy="Fetch the missing files into the folder.",
                )
            file = MappedFile(path)
            opened[shard] = (file, read_safetensors_header(file)[0])
        file, layouts = opened[shard]
        if name not in layouts:
            raise CheckpointError(
                f"is not in this file, although {index.name} says so.",
                file=file.path,
                tensor=name,
                remedy="Index and shards are of different versions: fetch them all again.",
            )
        places[name] = (file, layouts[name])
    return places
