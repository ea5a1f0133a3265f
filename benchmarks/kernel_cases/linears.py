"""Matrix products with packed weights beside torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve import _native
from fuserve._native import ThreadPool
from fuserve.kernels.linear import (
    InputKind,
    LinearInput,
    Storage,
    WeightFormat,
    pack_floats,
    packed_linear,
)
from fuserve.kernels.machine import selected_isa
from fuserve.quantization.scheme import OUTLIER_THRESHOLD

from .measure import (
    Call,
    Ceilings,
    Claim,
    Effort,
    OnInput,
    Row,
    in_turns,
    num_copies,
    repeated,
    roofline_row,
)
from .torch_peers import linear_peer

Floats = npt.NDArray[np.float32]

HEAD_ROWS = 49152
HEAD_MAX_TOKENS = 16  # a head computes only the rows that are sampled


FLOATS, BLOCKS = InputKind.FLOATS, InputKind.BLOCKS
INPUT_NAMES = {
    FLOATS: "float",
    BLOCKS: "int8",
    InputKind.TOKEN: "int8 per token",
    InputKind.FIXED: "int8 per tensor",
    InputKind.OUTLIERS: "int8 and outliers",
}
STATIC_SCALE = 4 / 127  # of standard normal inputs
OUTLIER_COLS, OUTLIER_FACTOR = 6, 40.0  # as arXiv 2208.07339 describes them


@dataclass(frozen=True)
class Kernel:
    """A storage of the weights with a type of the activations."""

    storage: Storage
    input: InputKind

    @property
    def name(self) -> str:
        """Such as ``int4 asymmetric, groups of 64 x int8``."""
        if not self.storage.is_integer:
            return self.storage.describe()
        return f"{self.storage.describe()} x {INPUT_NAMES[self.input]}"

    def arithmetic(self, ceilings: Ceilings) -> tuple[str, float]:
        """The instruction ceiling that applies."""
        if self.input == InputKind.FLOATS:
            return "fp32 FMA", ceilings.fp32_op_per_s
        if self.storage.format == WeightFormat.Q8_CHANNEL:
            return "row dot", ceilings.row_dot_op_per_s
        if self.storage.format == WeightFormat.Q8:
            return "int8 dot", ceilings.int8_dot_op_per_s
        return "int4 dot", ceilings.int4_dot_op_per_s


Q8, Q4, Q4A = WeightFormat.Q8, WeightFormat.Q4, WeightFormat.Q4_ASYMMETRIC
INTEGERS = [Storage(Q8, group) for group in (0, 32, 128)]
INTEGERS += [Storage(Q4, 32), *(Storage(Q4A, group) for group in (32, 64, 128))]
DEFAULT_INT4 = Kernel(Storage(Q4A, 64), BLOCKS)  # what --quantization int4 gives

KERNELS = [
    Kernel(Storage(f), FLOATS) for f in (WeightFormat.F32, WeightFormat.BF16, WeightFormat.F16)
]
KERNELS += [Kernel(storage, given) for given in (BLOCKS, FLOATS) for storage in INTEGERS]
WHOLE_ROWS = [
    Kernel(Storage(WeightFormat.Q8_CHANNEL), given)
    for given in (InputKind.TOKEN, InputKind.FIXED, InputKind.OUTLIERS)
]
KERNELS += WHOLE_ROWS
SHAPES = [(576, 576), (1536, 576), (576, 1536), (HEAD_ROWS, 576)]  # SmolLM2-135M
SHAPES += [(2048, 2048), (8192, 2048), (2048, 8192), (HEAD_ROWS, 2048)]  # Llama, 1.07 B
TOKENS = (1, 8, 16, 128, 512)

QUICK_KERNELS = [
    Kernel(Storage(WeightFormat.F32), FLOATS),
    Kernel(Storage(Q8, 128), BLOCKS),
    Kernel(Storage(Q4, 32), BLOCKS),
    DEFAULT_INT4,
    *WHOLE_ROWS,
]
QUICK_SHAPES = [(1536, 576), (8192, 2048)]
QUICK_TOKENS = (1, 16, 512)


def measure_linears(effort: Effort, quick: bool) -> Iterator[Row | Claim]:
    """Every kernel on every shape; the ceilings are measured anew for each shape."""
    pool = ThreadPool(effort.threads)
    for rows, cols in QUICK_SHAPES if quick else SHAPES:
        ceilings = Ceilings.measure(effort.threads)
        weights = np.random.default_rng(rows + cols).standard_normal((rows, cols), np.float32)
        for kernel in QUICK_KERNELS if quick else KERNELS:
            if cols % (kernel.storage.group_size or 1):
                continue  # 576 features have no groups of 128
            yield from _measure_kernel(kernel, weights, pool, ceilings, effort, quick)


def _measure_kernel(
    kernel: Kernel,
    weights: Floats,
    pool: ThreadPool,
    ceilings: Ceilings,
    effort: Effort,
    quick: bool,
) -> Iterator[Row | Claim]:
    rows, cols = weights.shape
    ours, packed_bytes = _our_linear(kernel, weights, pool)
    peer_name, peer, peer_copies = linear_peer(kernel.storage, weights)
    for tokens in QUICK_TOKENS if quick else TOKENS:
        if rows == HEAD_ROWS and tokens > HEAD_MAX_TOKENS:
            continue
        x = np.random.default_rng(tokens).standard_normal((tokens, cols), np.float32)
        if kernel.input == InputKind.OUTLIERS:
            x[:, : cols - cols % OUTLIER_COLS : cols // OUTLIER_COLS] *= OUTLIER_FACTOR
        calls = {"fuserve": (ours(x), num_copies(packed_bytes)), peer_name: (peer(x), peer_copies)}
        row = roofline_row(
            kernel.name,
            f"{rows}x{cols}",
            f"M={tokens}",
            in_turns(calls, effort),
            operations=2 * tokens * rows * cols,
            num_bytes=packed_bytes,
            arithmetic=kernel.arithmetic(ceilings),
            read_bytes_per_s=ceilings.read_bytes_per_s,
            in_bytes=tokens == 1,
        )
        yield row
        if (kernel, rows, cols, tokens) == (DEFAULT_INT4, 8192, 2048, 512):
            yield Claim(
                f"GEMM W4A8 ({kernel.storage.describe()}), M=512, 2048x8192",
                row.rate * 1e9 / ceilings.int4_dot_op_per_s,
                0.70,
                f"{row.rate:.0f} of {ceilings.int4_dot_op_per_s / 1e9:.0f} GOP/s, the W4A8 "
                "instruction ceiling of this run",
            )


def _our_linear(kernel: Kernel, weights: Floats, pool: ThreadPool) -> tuple[OnInput, int]:
    isa = selected_isa()
    rows, cols = weights.shape
    shape = kernel.storage.shape(rows, cols)
    packed = np.empty(shape.packed_bytes, np.uint8)
    pack_floats(shape, weights, packed, pool)
    copies = repeated(packed, num_copies(shape.packed_bytes))
    given = LinearInput(kernel.input, STATIC_SCALE, OUTLIER_THRESHOLD)
    linears = [packed_linear(shape, copy, None, given) for copy in copies]

    def on(x: Floats) -> Call:
        out = np.empty((len(x), shape.tiles * 16), np.float32)
        return lambda copy: _native.linear(isa, pool, linears[copy], x, out)

    return on, shape.packed_bytes
