"""The form in which a network is run: a flat list of operations over images in NHWC.

A builder (``unet_program.py``, ``vae_program.py``, ...) turns a spec and a size into a ``Program``;
an executor runs all of it in one call. UNet, VAE, TAESD, text encoders and the small networks
that run once per prompt or schedule are all programs of four operations; a fifth serves programs
that make an image in bands (``banding.py``), a sixth those whose bands are made by several ranks
(``rank_bands.py``).

- **Values** are fp32 ``[batch, height, width, channels]``. Tokens are the same memory as their
  image, ``[batch, height * width, channels]``; text has height 1, a vector height and width 1.
- **Batch broadcasting**: a source with fewer rows (batch ``b``) than the output (batch ``B``, a
  multiple of ``b``) stands for ``B / b`` consecutive rows each: row ``r`` reads row
  ``r // (B / b)``. So the part of a guided pair that does not depend on the prompt is computed
  once. It holds for every value an operation reads.
- **Single assignment**: each value is an input or the output of exactly one earlier operation; an
  executor plans the memory. It may put a result over a residual that nothing reads later.
- **Views**: a value may be rows of another, which has a batch of 1. Whoever writes one writes the
  other; a value may be read when all of its rows have been written, each of them once.
- **Weights** are tensors named as in the checkpoint: ``[out, in]`` for a linear, ``[out, in, size,
  size]`` for a convolution; where size is 1 both have either form. Several names are stacked by
  rows; then there are as many biases or none.
- **Order of the epilogue**: product, bias, ``channel_add``, ``residual``, activation. A LoRA branch
  is a ``residual``, so also geglu can have one, of all its ``2 * out`` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from fuserve.diffusion.quantized_weight import QuantizedWeight

Array = npt.NDArray[np.float32]
Activation = Literal["none", "relu", "silu", "gelu", "quick_gelu", "geglu"]
"""``gelu`` is the exact one, by erf; ``quick_gelu`` is ``x * sigmoid(1.702 x)``. ``geglu`` (linears
only): the rows of the weight are [values; gates], out = value * gelu(gate)."""


SUMMED_PIXELS = 64
"""Pixels of a row whose sums are formed at once (``kNormPixels`` of ``csrc/image/program.h``)."""


@dataclass(frozen=True, slots=True)
class Value:
    """An image, a sequence of tokens or a vector; ``index`` is its place in ``Program.values``.

    It may be a band of a taller image (``bands``), with rows of the neighbouring bands around it in
    memory, which somebody fills and convolutions read.

    Attributes:
        first_row: of the band in the image.
        above: rows of neighbours before it.
        below: rows of neighbours behind it.
    """

    index: int
    batch: int
    height: int
    width: int
    channels: int
    first_row: int = 0
    above: int = 0
    below: int = 0

    @property
    def tokens(self) -> int:
        """Pixels, or tokens, of a row of the batch."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """NHWC."""
        return (self.batch, self.height, self.width, self.channels)

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """NHWC, with the rows of neighbours."""
        return (self.batch, self.above + self.height + self.below, self.width, self.channels)

    @property
    def size(self) -> int:
        """Floats that it takes, with the rows of neighbours."""
        batch, height, width, channels = self.stored_shape
        return batch * height * width * channels

    @property
    def norm_chunks(self) -> int:
        """Runs of pixels whose sums a group norm forms at once; see ``ChannelSums``."""
        return self.height * -(-self.width // SUMMED_PIXELS)


@dataclass(frozen=True, slots=True)
class Slice:
    """The channels of ``value`` from ``first`` on; how many is for the reader to say."""

    value: Value
    first: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of ``value`` from ``first`` on."""

    value: Value
    first: int


@dataclass(frozen=True, slots=True)
class ImageSums:
    """Of a whole image, for the group norm of an operation whose sources are some rows of it.

    Attributes:
        values: what ``ChannelSums`` has made of each whole source.
        pixels: of the whole image.
    """

    values: tuple[Value, ...]
    pixels: int


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """Over the pixels and the channels of a group of all (concatenated) sources of an operation."""

    weight: str
    bias: str
    groups: int
    eps: float
    silu: bool = False


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Over the channels of a token."""

    weight: str
    bias: str
    eps: float


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution of one or two sources, whose channels are concatenated.

    Attributes:
        name: the module's path in the checkpoint, for messages and measurements.
        padding: zeros above, left, below and right, after ``norm`` and ``upsample``.
        upsample: double the source by nearest neighbours first.
        norm: applied to the (concatenated) sources first.
        channel_add: added to all pixels of a row: channels ``first`` to ``first + out.channels`` of
            a value of height and width 1, a time embedding.
        sums: what ``norm`` goes by; None: the sources' own.
    """

    name: str
    out: Value
    sources: tuple[Value, ...]
    weight: tuple[str, ...]
    bias: tuple[str, ...] = ()
    size: Literal[1, 3] = 3
    stride: Literal[1, 2] = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    upsample: bool = False
    norm: GroupNorm | None = None
    channel_add: Slice | None = None
    residual: Value | None = None
    activation: Activation = "none"
    sums: ImageSums | None = None

    def reads(self) -> tuple[Value, ...]:
        """All values that it reads."""
        added = () if self.channel_add is None else (self.channel_add.value,)
        residual = () if self.residual is None else (self.residual,)
        return (*self.sources, *added, *residual, *_values(self.sums))


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product over tokens; ``norm`` is applied to them first.

    Attributes:
        precise: its weights are kept as float32 whatever others are: few, and much depends on them.
    """

    name: str
    out: Value
    source: Value
    weight: tuple[str, ...]
    bias: tuple[str, ...] = ()
    norm: LayerNorm | None = None
    activation: Activation = "none"
    residual: Value | None = None
    precise: bool = False

    def reads(self) -> tuple[Value, ...]:
        """All values that it reads."""
        return (self.source, *(() if self.residual is None else (self.residual,)))


@dataclass(frozen=True, slots=True)
class Attention:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the tokens of a row; heads lie side by side.

    ``causal``: token ``t`` sees the tokens up to ``t``.
    """

    name: str
    out: Value
    query: Slice
    key: Slice
    value: Slice
    heads: int
    head_dim: int
    causal: bool = False

    def reads(self) -> tuple[Value, ...]:
        """All values that it reads."""
        return (self.query.value, self.key.value, self.value.value)


@dataclass(frozen=True, slots=True)
class Normalize:
    """A norm that stands alone, of one source, or of two with a group norm."""

    name: str
    out: Value
    sources: tuple[Value, ...]
    norm: GroupNorm | LayerNorm
    sums: ImageSums | None = None

    def reads(self) -> tuple[Value, ...]:
        """All values that it reads."""
        return (*self.sources, *_values(self.sums))


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """What a group norm needs to know of an image, or of the next rows of one.

    Of each channel the sum and the sum of squares, over up to ``SUMMED_PIXELS`` pixels of a row at
    a time, of the differences from a pivot, the image's first pixel: ``[batch, chunks, 1, 2 *
    channels]``. Where the image begins a row with the pivots goes before.

    Attributes:
        pivots: that first row; None: the image begins here.
    """

    name: str
    out: Value
    source: Value
    pivots: Value | None = None

    def reads(self) -> tuple[Value, ...]:
        """All values that it reads."""
        return (self.source, *(() if self.pivots is None else (self.pivots,)))


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of an image from the ranks that have them; moves in a row are one exchange.

    Of each row the first ``out.width`` pixels, with as many channels as ``out`` has, or there are.

    Attributes:
        out: gets the rows that it has: a whole image, or ``source`` itself, whose rows of
            neighbours these are.
        source: this rank's rows.
        rows: of the image, which each rank sends.
    """

    name: str
    out: Value
    source: Slice
    rows: tuple[tuple[int, ...], ...]

    @property
    def channels(self) -> int:
        """Of each pixel."""
        return min(self.out.channels, self.source.value.channels - self.source.first)

    @property
    def is_inner(self) -> bool:
        """Whether it fills rows of neighbours."""
        return self.out == self.source.value

    def reads(self) -> tuple[Value, ...]:
        """All values of this rank that it reads."""
        return (self.source.value,)


Op = Conv | Linear | Attention | Normalize | ChannelSums | Move


@dataclass(frozen=True, slots=True)
class Program:
    """Operations in the order in which they run; inputs are bound to arrays at each run."""

    values: tuple[Value, ...]
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    ops: tuple[Op, ...]
    views: Mapping[Value, Rows] = field(default_factory=dict)

    def weight_shapes(self) -> Iterator[tuple[Op, tuple[str, ...], tuple[int, ...]]]:
        """For each use of weights: the operation, the names, and the shape of their stack.

        The shape of a convolution's weight is ``[out, in, size, size]``, also with size 1.
        """
        for op in self.ops:
            if isinstance(op, Attention | ChannelSums | Move):
                continue
            channels = sum(source.channels for source in _sources(op))
            if op.norm is not None:
                yield op, (op.norm.weight,), (channels,)
                yield op, (op.norm.bias,), (channels,)
            if isinstance(op, Conv | Linear):
                rows = op.out.channels * (2 if op.activation == "geglu" else 1)
                size = (op.size, op.size) if isinstance(op, Conv) else ()
                yield op, op.weight, (rows, channels, *size)
                if op.bias:
                    yield op, op.bias, (rows,)

    def validate(self) -> None:
        """Check that the program can be run.

        Raises:
            ValueError: naming the operation at fault. Programs come from our own builders, so
                this is a mistake in one of them, not in a checkpoint.
        """
        for index, value in enumerate(self.values):
            if value.index != index or min(value.shape) < 1:
                raise ValueError(f"value {index} is {value}")
        if len(set(self.inputs.values())) != len(self.inputs):
            raise ValueError("two inputs are one value")
        for view, rows in self.views.items():
            whole = rows.value
            if not (
                whole.batch == view.batch == 1
                and (whole.width, whole.channels) == (view.width, view.channels)
                and 0 <= rows.first <= whole.height - view.height
                and whole not in self.views
            ):
                raise ValueError(f"{view} is no view of rows {rows.first} on of {whole}")
        written = _Written(self.views)
        for value in self.inputs.values():
            written.add(value)
        for op in self.ops:
            for value in op.reads():
                _check(op, written.all_of(value), f"reads {value}, which nothing has written")
                _check(
                    op,
                    op.out.batch % value.batch == 0,
                    f"reads a batch of {value.batch} for one of {op.out.batch}",
                )
            is_again = written.any_of(op.out) and not (isinstance(op, Move) and op.is_inner)
            _check(op, not is_again, "writes a value for the second time")
            _check(op, self.values[op.out.index] == op.out, "writes a value of another program")
            _check_op(op)
            written.add(op.out)
        for name, value in self.outputs.items():
            if not written.all_of(value):
                raise ValueError(f"nothing writes the output {name!r}")


class Weights(Protocol):
    """Where an executor finds the tensors that a program names.

    Every method raises CheckpointError for a name that is not there.
    """

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape as it is stored."""
        ...

    def float32(self, name: str) -> Array:
        """The tensor's values, of ``shape``; perhaps a view of the file, not to be written."""
        ...

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as integers, if it is stored as such."""
        ...

    def release(self, name: str) -> None:
        """Let go of the tensor's resident pages: it has been packed."""
        ...


class Executor(Protocol):
    """What runs one program."""

    @property
    def program(self) -> Program:
        """The program."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, of their values' shapes, from one array for each input."""
        ...


class _Written:
    """The rows of each value that have been written."""

    def __init__(self, views: Mapping[Value, Rows]) -> None:
        self._views = views
        self._rows: dict[Value, npt.NDArray[np.bool_]] = {}

    def add(self, value: Value) -> None:
        self._of(value)[:] = True

    def any_of(self, value: Value) -> bool:
        return bool(self._of(value).any())

    def all_of(self, value: Value) -> bool:
        return bool(self._of(value).all())

    def _of(self, value: Value) -> npt.NDArray[np.bool_]:
        rows = self._views.get(value) or Rows(value, 0)
        if rows.value not in self._rows:
            self._rows[rows.value] = np.zeros(rows.value.height, np.bool_)
        return self._rows[rows.value][rows.first : rows.first + value.height]


def _values(sums: ImageSums | None) -> tuple[Value, ...]:
    return () if sums is None else sums.values


def _sources(op: Conv | Linear | Normalize) -> tuple[Value, ...]:
    return (op.source,) if isinstance(op, Linear) else op.sources


def _check(op: Op, holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(f"{type(op).__name__} {op.name!r} {fault}")


def _check_op(op: Op) -> None:
    match op:
        case Conv():
            _check_conv(op)
        case Linear():
            _check_linear(op)
        case Attention():
            _check_attention(op)
        case Normalize():
            _check_normalize(op)
        case ChannelSums():
            _check_channel_sums(op)
        case Move():
            _check(op, op.out.width <= op.source.value.width, f"fills {op.out} with {op.source}")


def _check_norm(op: Op, norm: GroupNorm | LayerNorm | None, sources: tuple[Value, ...]) -> None:
    channels = sum(source.channels for source in sources)
    if isinstance(norm, GroupNorm):
        _check(op, channels % norm.groups == 0, f"has {channels} channels in {norm.groups} groups")


def _check_sums(op: Conv | Normalize) -> None:
    if op.sums is None:
        return
    _check(op, isinstance(op.norm, GroupNorm), "has sums, but no group norm")
    rows = {value.height for value in op.sums.values}
    shapes = [(value.width, value.channels) for value in op.sums.values]
    wanted = [(1, 2 * source.channels) for source in op.sources]
    _check(op, shapes == wanted and len(rows) == 1, f"has sums {shapes}, not {wanted}")


def _check_channel_sums(op: ChannelSums) -> None:
    rows = op.source.norm_chunks + (op.pivots is None)
    wanted = (op.source.batch, rows, 1, 2 * op.source.channels)
    _check(op, op.out.shape == wanted, f"makes {wanted}, not {op.out}")
    if op.pivots is not None:
        fits = (op.pivots.tokens, op.pivots.channels) == (1, op.out.channels)
        _check(op, fits, f"has {op.pivots} for pivots")


def _check_stack(op: Conv | Linear) -> None:
    _check(op, bool(op.weight), "has no weight")
    _check(op, len(op.bias) in (0, len(op.weight)), "has not one bias for each of its weights")


def _check_residual(op: Conv | Linear) -> None:
    if op.residual is not None:
        wanted = op.out.channels * (2 if op.activation == "geglu" else 1)
        size = (op.residual.tokens, op.residual.channels)
        _check(op, size == (op.out.tokens, wanted), f"adds {op.residual} to {op.out}")


def _check_conv(op: Conv) -> None:
    _check_stack(op)
    _check(op, len(op.sources) in (1, 2), "has neither one source nor two")
    first = op.sources[0]
    for source in op.sources:
        same = (source.height, source.width) == (first.height, first.width)
        _check(op, same, "has sources of two sizes")
    _check_norm(op, op.norm, op.sources)
    _check_sums(op)
    top, left, bottom, right = op.padding
    scale = 2 if op.upsample else 1
    height = (first.height * scale + top + bottom - op.size) // op.stride + 1
    width = (first.width * scale + left + right - op.size) // op.stride + 1
    is_size = (op.out.height, op.out.width) == (height, width)
    _check(op, is_size, f"makes {height} x {width} pixels of {first}, not {op.out}")
    _check(op, op.activation != "geglu", "has an activation for linears only")
    _check_residual(op)
    if op.channel_add is not None:
        added = op.channel_add
        _check(op, added.value.tokens == 1, "adds an image to every pixel")
        _check_channels(op, added, op.out.channels)


def _check_linear(op: Linear) -> None:
    _check_stack(op)
    _check(op, op.source.tokens == op.out.tokens, f"makes {op.out} of {op.source}")
    _check_residual(op)


def _check_attention(op: Attention) -> None:
    channels = op.heads * op.head_dim
    for part in (op.query, op.key, op.value):
        _check_channels(op, part, channels)
    same = op.key.value.tokens == op.value.value.tokens
    _check(op, same, "has keys and values of two lengths")
    is_size = (op.out.tokens, op.out.channels) == (op.query.value.tokens, channels)
    _check(op, is_size, f"makes {op.out} of {op.query.value}")
    square = op.query.value.tokens == op.key.value.tokens
    _check(op, square or not op.causal, "is causal over keys of another length")


def _check_channels(op: Op, part: Slice, channels: int) -> None:
    stop = part.first + channels
    _check(op, part.first >= 0 and stop <= part.value.channels, f"reads up to channel {stop}")


def _check_normalize(op: Normalize) -> None:
    count = len(op.sources)
    _check(op, count == 1 or (count == 2 and isinstance(op.norm, GroupNorm)), "has bad sources")
    _check_norm(op, op.norm, op.sources)
    _check_sums(op)
    channels = sum(source.channels for source in op.sources)
    same = all(source.tokens == op.out.tokens for source in op.sources)
    _check(op, same and channels == op.out.channels, f"makes {op.out} of {op.sources}")
