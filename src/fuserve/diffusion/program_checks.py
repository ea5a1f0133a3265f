"""Whether a program can be run: what its builders must keep to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fuserve.diffusion.program import (
    Attention,
    ChannelSums,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Move,
    Normalize,
    Op,
    Program,
    Rows,
    Slice,
    Value,
)


def check_program(program: Program) -> None:
    """Check that a program can be run.

    Raises:
        ValueError: naming the operation at fault. Programs come from our own builders, so
            this is a mistake in one of them, not in a checkpoint.
    """
    for index, value in enumerate(program.values):
        if value.index != index or min(value.shape) < 1:
            raise ValueError(f"value {index} is {value}")
    if len(set(program.inputs.values())) != len(program.inputs):
        raise ValueError("two inputs are one value")
    for view, rows in program.views.items():
        whole = rows.value
        if not (
            whole.batch == view.batch == 1
            and (whole.width, whole.channels) == (view.width, view.channels)
            and 0 <= rows.first <= whole.height - view.height
            and whole not in program.views
        ):
            raise ValueError(f"{view} is no view of rows {rows.first} on of {whole}")
    written = _Written(program.views)
    for value in program.inputs.values():
        written.add(value)
    for op in program.ops:
        for value in op.reads():
            _check(op, written.all_of(value), f"reads {value}, which nothing has written")
            _check(
                op,
                op.out.batch % value.batch == 0,
                f"reads a batch of {value.batch} for one of {op.out.batch}",
            )
        is_again = written.any_of(op.out) and not (isinstance(op, Move) and op.is_inner)
        _check(op, not is_again, "writes a value for the second time")
        _check(op, program.values[op.out.index] == op.out, "writes a value of another program")
        _check_op(op)
        written.add(op.out)
    for name, value in program.outputs.items():
        if not written.all_of(value):
            raise ValueError(f"nothing writes the output {name!r}")


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
