"""Reading LoRA files in the layouts that trainers write: kohya's, diffusers', PEFT's.

A module is named in one of three ways: by its path in diffusers' modules, by that path with ``_``
for every ``.`` (kohya), or likewise by its path in the single-file checkpoints (kohya for SDXL).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fuserve.checkpoints import to_float32
from fuserve.checkpoints.safetensors_folder import StoredTensors, refuse_pickled_diffusion
from fuserve.diffusion.lora import Branch
from fuserve.diffusion.program import Array, Conv, Linear, Program, Weights
from fuserve.errors import CheckpointError, UnsupportedModelError

UNET = "unet"
_SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_KOHYA = (("lora_unet_", UNET), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"))
_KOHYA_SINGLE = ("lora_te_", "text_encoder")
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon with a Tucker core",
    "oft_": "OFT",
}


class Modules:
    """The modules of a network that can have a LoRA, by every name they go by.

    Args:
        weights: of the network, for the shapes.
        programs: that name all its modules.
        other_names: what the first part of a module's path is called elsewhere, such as in
            single-file checkpoints; the rest of the path is the same.
    """

    def __init__(
        self, weights: Weights, programs: Iterable[Program], other_names: Mapping[str, str]
    ) -> None:
        self.weights = weights
        self._by_name: dict[str, str] = {}
        for program in programs:
            for op in program.ops:
                for weight in op.weight if isinstance(op, Conv | Linear) else ():
                    self._add(weight.removesuffix(".weight"), other_names)

    def _add(self, path: str, other_names: Mapping[str, str]) -> None:
        names = [path]
        for other, start in other_names.items():
            if path == start or path.startswith(start.rstrip(".") + "."):
                names.append(other + path.removeprefix(start))
        for name in names:
            self._by_name[name] = self._by_name[name.replace(".", "_")] = path

    def find(self, name: str) -> str | None:
        """The path of the module that goes by this name."""
        return self._by_name.get(name)


def read_lora(
    path: Path, scale: float, networks: Mapping[str, Modules]
) -> dict[str, dict[str, list[Branch]]]:
    """The branches of a LoRA, by network and module path.

    Args:
        path: a ``.safetensors`` file, or a folder with one.
        scale: multiplies all of it; the file's own ``alpha / rank`` does too.
        networks: ``unet``, ``text_encoder`` and ``text_encoder_2``, those there are.

    Raises:
        CheckpointError: the file is damaged, or its LoRA is for another model.
        UnsupportedModelError: it is no plain LoRA but one of the methods related to it.
    """
    stored = _open(path)
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for key in stored.tensor_names():
        network, module, role = _parse(key, stored.path, networks)
        found[network, module][role] = key
    branches: dict[str, dict[str, list[Branch]]] = {name: {} for name in networks}
    for (network, module), tensors in found.items():
        weight = networks[network].weights.shape(f"{module}.weight")
        branch = _branch(stored, tensors, weight, scale)
        branches[network].setdefault(module, []).append(branch)
    return branches


def _open(path: Path) -> StoredTensors:
    if path.is_dir():
        return StoredTensors.of_folder(path, "pytorch_lora_weights", refuse_pickled_diffusion)
    return StoredTensors.of_file(path)


def _parse(key: str, file: Path, networks: Mapping[str, Modules]) -> tuple[str, str, str]:
    """Network, module path and role of a tensor."""
    for mark, kind in _OTHER_KINDS.items():
        if mark in key:
            raise UnsupportedModelError(
                f"{file}: tensor {key!r} belongs to a {kind}, which fuserve does not compute. "
                "Use a plain LoRA, or merge this one with the tool that made it."
            )
    suffix = next((one for one in _SUFFIXES if key.endswith(one)), None)
    if suffix is not None:
        network, name = _network(key.removesuffix(suffix), networks)
        if network in networks:
            module = _module(name, networks[network])
            if module is not None:
                return network, module, _SUFFIXES[suffix]
    raise CheckpointError(
        "belongs to no module of this model that can have a LoRA.",
        file=file,
        tensor=key,
        remedy="Give a LoRA that was trained for this model's architecture.",
    )


def _network(name: str, networks: Mapping[str, Modules]) -> tuple[str, str]:
    """Split the name of a module into network and rest."""
    name = name.removeprefix("base_model.model.")
    for prefix, network in (*_KOHYA, _KOHYA_SINGLE):
        if name.startswith(prefix):
            return network, name.removeprefix(prefix)
    for network in (UNET, "text_encoder_2", "text_encoder"):
        if name.startswith(f"{network}."):
            rest = name.removeprefix(f"{network}.").removeprefix("base_model.model.")
            return network, rest
    return UNET, name


def _module(name: str, modules: Modules) -> str | None:
    """The module's path, also from the names of attention processors of old."""
    name = name.replace(".processor.", ".").removesuffix(".alpha")
    found = modules.find(name) or modules.find(f"{name}.0")  # to_out was to_out.0
    if found is None:
        name = re.sub(r"\.self_attn\.to_(q|k|v)$", r".self_attn.\1_proj", name)
        name = re.sub(r"\.self_attn\.to_out$", ".self_attn.out_proj", name)
        found = modules.find(name)
    return found


def _branch(
    stored: StoredTensors, tensors: Mapping[str, str], weight: tuple[int, ...], scale: float
) -> Branch:
    for role in ("down", "up"):
        if role not in tensors:
            raise CheckpointError(
                f"its {role} matrix is missing.",
                file=stored.path,
                tensor=next(iter(tensors.values())),
                remedy="The file is incomplete: fetch it again.",
            )
    down, up = _values(stored, tensors["down"]), _values(stored, tensors["up"])
    rank = down.shape[0]
    up = up.reshape(len(up), -1)
    # A 1x1 convolution may be a matrix on either side.
    fits = up.shape == (weight[0], rank) and _matrix_shape(down.shape) == (
        rank,
        *_matrix_shape(weight)[1:],
    )
    if not fits:
        raise CheckpointError(
            f"has the shapes {list(down.shape)} and {list(up.shape)}, but the module's weight is "
            f"{list(weight)}.",
            file=stored.path,
            tensor=tensors["down"],
            remedy="Give a LoRA that was trained for this model's architecture.",
        )
    alpha = float(_values(stored, tensors["alpha"]).reshape(-1)[0]) if "alpha" in tensors else rank
    return Branch(down.reshape(rank, *weight[1:]), up * np.float32(scale * alpha / rank))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] in ((), (1, 1)) else shape


def _values(stored: StoredTensors, name: str) -> Array:
    return np.array(to_float32(stored.tensor(name)), np.float32)
