"""Which packed format each of a model's tensors gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fuserve.architectures import tensor_shapes
from fuserve.decoder.model_part import PART_MARK, ModelPart, PartTensor, Span
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage, WeightFormat
from fuserve.quantization import (
    GGML_GRIDS,
    REGRIDDED,
    LayerChoice,
    QuantScheme,
    Recipe,
    describe_dtype,
    grid_from,
    recipe_named,
    scheme_from,
)
from fuserve.quantization.scheme import Activations

ALIGNMENT = 64  # bytes: a cache line
HEAD_WISE = (".q", ".k", ".v")

INPUT_VECTORS = ("input_scale", "input_smoothing", "input_shift")
VECTORS = (*INPUT_VECTORS, "output_shift")
"""Fields of a ``QuantizedLinear`` that are tensors of the plan, ``layers.1.down.input_shift``."""

FIRST_OF_INPUT: Mapping[str, str] = {".k": ".q", ".v": ".q", ".up": ".gate"}
"""Whose input vectors a linear has: those that read the same input have the same."""

PLAIN: Mapping[str, Storage] = {
    "F32": Storage(WeightFormat.F32),
    "F16": Storage(WeightFormat.F16),
    "BF16": Storage(WeightFormat.BF16),
    "float32": Storage(WeightFormat.F32),
    "float16": Storage(WeightFormat.F16),
    "bfloat16": Storage(WeightFormat.BF16),
}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """Where and how one tensor lies in the packed memory.

    ``storage`` is None for vectors and tables, which are plain float32. ``rows`` and ``cols`` are
    those of the canonical tensor that it has, as in ``PartTensor``. ``activations`` and
    ``outlier_threshold`` are as in ``QuantScheme``, for linear weights.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage | None
    row_group: int
    offset: int
    num_bytes: int
    rows: Span | None = None
    cols: Span | None = None
    activations: Activations = "block"
    outlier_threshold: float | None = None

    @property
    def end(self) -> int:
        """Where the next tensor may begin."""
        return -(-(self.offset + self.num_bytes) // ALIGNMENT) * ALIGNMENT

    @property
    def source(self) -> str:
        """The canonical tensor that it is (a piece of)."""
        return self.name.partition(PART_MARK)[0]

    @property
    def vector_of(self) -> str | None:
        """The linear weight that this is one of the ``VECTORS`` of."""
        owner, _, field = self.name.rpartition(".")
        return owner if field in VECTORS else None


def plan_storage(
    weights: DecoderWeights, options: ExecutorOptions, part: ModelPart | None = None
) -> tuple[dict[str, PlannedTensor], dict[str, str]]:
    """Formats and places of all tensors, and how each linear weight's format is described.

    Args:
        weights: the whole model's; nothing is read of them.
        options: formats.
        part: what is held of the model; None is all of it.

    Raises:
        InvalidRequestError: the options contradict each other, or name a layer that there is not.
    """
    part = part or ModelPart(weights.spec, rank_invariant=options.rank_invariant)
    head_dim = weights.spec.attention.head_dim
    choice = _choice(options)
    shapes = tensor_shapes(weights.spec)
    linears = [name for name in shapes if name.startswith("layers.") and len(shapes[name]) == 2]
    choice.check_patterns((*linears, "head", "embedding"))
    plan: dict[str, PlannedTensor] = {}
    descriptions: dict[str, str] = {}
    offset = 0

    def add(tensor: PartTensor, held: _Held) -> None:
        nonlocal offset
        planned = plan[tensor.name] = _place(tensor, held, head_dim, offset)
        offset = planned.end

    for tensor in part.tensors():
        if not _is_linear(tensor):
            add(tensor, _Held(None))
            continue
        held, descriptions[tensor.source] = _linear(weights, tensor, options, choice)
        add(tensor, held)
        for vector, size in _vectors(weights, tensor, held, plan).items():
            name = f"{tensor.name}.{vector}"
            add(PartTensor(name, name, (size,)), _Held(None))
    return plan, descriptions


@dataclass(frozen=True, slots=True)
class _Held:
    """How a tensor is held; see ``PlannedTensor``."""

    storage: Storage | None
    activations: Activations = "block"
    outlier_threshold: float | None = None


def _choice(options: ExecutorOptions) -> LayerChoice:
    if options.quantization is None:
        if options.group_size is not None or options.quantize_embeddings:
            raise InvalidRequestError("group_size and quantize_embeddings need quantization")
        recipe = None
    elif options.quantization in ("int8", "int4"):
        scheme = QuantScheme.from_name(options.quantization, options.group_size, options.symmetric)
        recipe = Recipe("rtn", scheme)
    else:
        recipe = recipe_named(options.quantization, options.group_size)
    choice = LayerChoice.parse(recipe, options.quantize_layers)
    if options.quantize_embeddings:
        choice = replace(choice, overrides=choice.overrides[: len(options.quantize_layers)])
    if any(recipe.needs_calibration for recipe in choice.recipes):
        name = options.quantization or " ".join(options.quantize_layers)
        raise InvalidRequestError(
            f"{name} needs text to calibrate with: run fuserve quantize MODEL OUT --scheme {name} "
            "first, and load OUT"
        )
    return choice


def _is_linear(tensor: PartTensor) -> bool:
    return len(tensor.shape) == 2 and tensor.name != "position_embedding"


def _linear(
    weights: DecoderWeights, tensor: PartTensor, options: ExecutorOptions, choice: LayerChoice
) -> tuple[_Held, str]:
    """How a linear weight is held, and the description of it."""
    name, first_col = tensor.source, tensor.cols[0] if tensor.cols else 0
    own, wanted = weights.scheme(name), choice.recipe_of(name)
    if own is None:
        if wanted is not None:
            return _by_scheme(wanted.scheme, options)
        dtype = weights.dtype(name)
        storage = _unquantized(dtype, options)
        if storage == GGML_GRIDS.get(dtype):
            storage = grid_from(storage, first_col)
        keeps_grid = storage in (GGML_GRIDS.get(dtype), REGRIDDED.get(dtype))
        held = _Held(storage, _activations("block", options))
        return held, describe_dtype(dtype) if keeps_grid else storage.describe()
    if wanted is not None:
        raise InvalidRequestError(
            f"the checkpoint is quantized already ({own.describe()}): leave quantization out"
        )
    if options.dtype != "auto":
        return _Held(PLAIN[options.dtype], "float"), options.dtype
    return _by_scheme(scheme_from(own, first_col), options)


def _by_scheme(scheme: QuantScheme, options: ExecutorOptions) -> tuple[_Held, str]:
    threshold = scheme.outlier_threshold
    if threshold is not None and options.outlier_threshold is not None:
        threshold = options.outlier_threshold
        scheme = replace(scheme, outlier_threshold=threshold)
    held = _Held(scheme.storage, _activations(scheme.activations, options), threshold)
    return held, scheme.describe()


def _activations(wanted: Activations, options: ExecutorOptions) -> Activations:
    return "float" if options.activations == "float" else wanted


def _unquantized(dtype: str, options: ExecutorOptions) -> Storage:
    if options.dtype != "auto":
        return PLAIN[options.dtype]
    return PLAIN.get(dtype) or GGML_GRIDS.get(dtype) or REGRIDDED[dtype]


def _vectors(
    weights: DecoderWeights,
    tensor: PartTensor,
    held: _Held,
    plan: Mapping[str, PlannedTensor],
) -> dict[str, int]:
    """The vectors of a linear weight that have no place yet, with their sizes."""
    rows, cols = tensor.shape
    sizes = {"input_scale": 1, "input_smoothing": cols, "input_shift": cols, "output_shift": rows}
    has = weights.vectors(tensor.source) | (
        {"input_scale"} if held.activations == "tensor" else set()
    )
    return {
        vector: size
        for vector, size in sizes.items()
        if vector in has and place_of(tensor.name, vector, plan) is None
    }


def place_of(name: str, vector: str, plan: Mapping[str, PlannedTensor]) -> PlannedTensor | None:
    """Where a linear weight's vector lies: with the first linear of its input, or its own."""
    names = [f"{name}.{vector}"]
    for suffix, first in FIRST_OF_INPUT.items():
        if vector in INPUT_VECTORS and name.endswith(suffix):
            names.insert(0, f"{name.removesuffix(suffix)}{first}.{vector}")
    return next((plan[one] for one in names if one in plan), None)


def _place(tensor: PartTensor, held: _Held, head_dim: int, offset: int) -> PlannedTensor:
    storage, shape = held.storage, tensor.shape
    row_group, num_bytes = 0, 4 * math.prod(shape)
    if storage is not None:
        rows, cols = shape
        row_group = head_dim if tensor.name.endswith(HEAD_WISE) else 0
        num_bytes = int(storage.shape(rows, cols, row_group).packed_bytes)
    return PlannedTensor(
        tensor.name,
        shape,
        storage,
        row_group,
        offset,
        num_bytes,
        tensor.rows,
        tensor.cols,
        held.activations,
        held.outlier_threshold,
    )
