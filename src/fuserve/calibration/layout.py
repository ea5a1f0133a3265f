"""The layouts that ``fuserve quantize`` writes, and which schemes each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from fuserve.checkpoints.quantized.awq import awq_config, write_awq
from fuserve.checkpoints.quantized.bitsandbytes import bitsandbytes_config, write_bitsandbytes
from fuserve.checkpoints.quantized.compressed_tensors import (
    VECTORS,
    compressed_config,
    write_compressed,
)
from fuserve.checkpoints.quantized.gptq import gptq_config, write_gptq
from fuserve.errors import InvalidRequestError
from fuserve.quantization import QuantizedLinear, QuantScheme

LayoutName = Literal["auto", "compressed-tensors", "gptq", "awq", "bitsandbytes"]
Parts = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How quantized layers are stored.

    Attributes:
        write: the tensors of one layer, by module name.
        config: ``quantization_config``, from the scheme of each quantized module, the linear
            modules that are kept, and the names of all tensors written.
    """

    write: Callable[[str, QuantizedLinear], Parts]
    config: Callable[[Mapping[str, QuantScheme], Sequence[str], Sequence[str]], dict[str, Any]]


def choose_layout(name: LayoutName, schemes: Sequence[QuantScheme], damping: float) -> Layout:
    """The layout of a name that can hold all the schemes.

    Raises:
        InvalidRequestError: it cannot hold them.
    """
    has_outliers = any(scheme.outlier_threshold is not None for scheme in schemes)
    if name == "auto":
        name = "bitsandbytes" if has_outliers else "compressed-tensors"
    kinds = set(schemes)
    only = next(iter(kinds)) if len(kinds) == 1 else None
    if name == "compressed-tensors":
        if has_outliers:
            _refuse(name, "outliers in float", "bitsandbytes")
        return Layout(write_compressed, _compressed_config)
    if only is None:
        _refuse(name, "mixed schemes", "compressed-tensors")
    if name == "bitsandbytes":
        if only.activations != "token":
            _refuse(name, only.describe(), "compressed-tensors")
        return Layout(
            write_bitsandbytes, lambda _modules, kept, _names: bitsandbytes_config(only, list(kept))
        )
    if not only.is_weight_only or (name == "awq" and only.weight_bits != 4):
        _refuse(name, only.describe(), "compressed-tensors")
    if name == "gptq":
        return Layout(write_gptq, lambda _modules, _kept, _names: gptq_config(only, damping))
    return Layout(write_awq, lambda _modules, kept, _names: awq_config(only, list(kept)))


def _compressed_config(
    modules: Mapping[str, QuantScheme], kept: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    has_vectors = any(name.rpartition(".")[2] in VECTORS for name in names)
    return compressed_config(modules, kept, has_vectors=has_vectors)


def _refuse(layout: str, what: str, instead: str) -> NoReturn:
    raise InvalidRequestError(
        f"the {layout} layout has no place for {what}; write the {instead} layout"
    )
