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
            channels = sum(source.channels for source in sources_of(op))
            if op.norm is not None:
                yield op, (op.norm.weight,), (channels,)
                yield op, (op.norm.bias,), (channels,)
            if isinstance(op, Conv | Linear):
                rows = op.out.channels * (2 if op.activation == "geglu" else 1)
                size = (op.size, op.size) if isinstance(op, Conv) else ()
                yield op, op.weight, (rows, channels, *size)
                if op.bias:
                    yield op, op.bias, (rows,)


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


def _values(sums: ImageSums | None) -> tuple[Value, ...]:
    return () if sums is None else sums.values


def sources_of(op: Conv | Linear | Normalize) -> tuple[Value, ...]:
    """What its norm and its product see, side by side."""
    return (op.source,) if isinstance(op, Linear) else op.sources
