"""Which packed format each of a model's tensors gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fuserve.architectures import DecoderSpec, tensor_shapes
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage, WeightFormat
from fuserve.quantization import GGML_GRIDS, REGRIDDED, QuantScheme, describe_dtype

ALIGNMENT = 64  # bytes: a cache line
HEAD_WISE = (".q", ".k", ".v")

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

    ``storage`` is None for vectors and tables, which are plain float32.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage | None
    row_group: int
    offset: int
    num_bytes: int


def plan_storage(
    weights: DecoderWeights, options: ExecutorOptions
) -> tuple[dict[str, PlannedTensor], dict[str, str]]:
    """Formats and places of all tensors, and how each linear weight's format is described.

    Raises:
        InvalidRequestError: the options contradict each other.
    """
    scheme = _scheme(options)
    plan: dict[str, PlannedTensor] = {}
    descriptions: dict[str, str] = {}
    offset = 0
    for name, shape in tensor_shapes(weights.spec).items():
        storage = None
        if _is_linear(name, shape):
            storage, descriptions[name] = _linear_storage(weights, name, options, scheme)
        planned = _place(name, shape, storage, weights.spec, offset)
        plan[name] = planned
        offset = -(-(offset + planned.num_bytes) // ALIGNMENT) * ALIGNMENT
    return plan, descriptions


def _scheme(options: ExecutorOptions) -> QuantScheme | None:
    if options.quantization is None:
        if options.group_size is not None or options.quantize_embeddings:
            raise InvalidRequestError(
                "group_size and quantize_embeddings need quantization to be int8 or int4"
            )
        return None
    return QuantScheme.from_name(options.quantization, options.group_size, options.symmetric)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != "position_embedding"


def _linear_storage(
    weights: DecoderWeights, name: str, options: ExecutorOptions, scheme: QuantScheme | None
) -> tuple[Storage, str]:
    own = weights.scheme(name)
    if own is None:
        dtype = weights.dtype(name)
        storage = _storage(name, dtype, options, scheme)
        keeps_grid = storage in (GGML_GRIDS.get(dtype), REGRIDDED.get(dtype))
        return storage, describe_dtype(dtype) if keeps_grid else storage.describe()
    if scheme is not None:
        raise InvalidRequestError(
            f"the checkpoint is quantized already ({own.describe()}): leave quantization out"
        )
    if options.dtype != "auto":
        return PLAIN[options.dtype], options.dtype
    return own.storage, own.describe()


def _storage(
    name: str, dtype: str, options: ExecutorOptions, scheme: QuantScheme | None
) -> Storage:
    is_embedding = name in ("embedding", "head")
    if scheme is not None and (options.quantize_embeddings or not is_embedding):
        return scheme.storage
    if options.dtype != "auto":
        return PLAIN[options.dtype]
    return PLAIN.get(dtype) or GGML_GRIDS.get(dtype) or REGRIDDED[dtype]


def _place(
    name: str, shape: tuple[int, ...], storage: Storage | None, spec: DecoderSpec, offset: int
) -> PlannedTensor:
    if storage is None:
        num_values = 1
        for size in shape:
            num_values *= size
        return PlannedTensor(name, shape, None, 0, offset, 4 * num_values)
    row_group = spec.attention.head_dim if name.endswith(HEAD_WISE) else 0
    rows, cols = shape
    num_bytes = int(storage.shape(rows, cols, row_group).packed_bytes)
    return PlannedTensor(name, shape, storage, row_group, offset, num_bytes)
