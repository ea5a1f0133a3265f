"""Writing a program operation by operation: sizes follow from the sources, indices are counted."""

from __future__ import annotations

from typing import Literal

from fuserve.diffusion.program import (
    Activation,
    Attention,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Normalize,
    Op,
    Program,
    Slice,
    Value,
)
from fuserve.diffusion.program_checks import check_program


class ProgramBuilder:
    """The operations of one program as they are written; ``finish`` gives the program.

    ``path`` arguments are modules of the checkpoint: their weight is ``path.weight``, their bias
    ``path.bias``. Several paths are stacked by rows.
    """

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._inputs: dict[str, Value] = {}
        self._outputs: dict[str, Value] = {}
        self._ops: list[Op] = []

    def input(self, name: str, batch: int, height: int, width: int, channels: int) -> Value:
        """An input, bound to an array of this size at each run."""
        self._inputs[name] = value = self._value(batch, height, width, channels)
        return value

    def output(self, name: str, value: Value) -> None:
        """Give a value out under a name."""
        self._outputs[name] = value

    def conv(
        self,
        path: str | tuple[str, ...],
        sources: Value | tuple[Value, ...],
        channels: int,
        *,
        size: Literal[1, 3] = 3,
        stride: Literal[1, 2] = 1,
        padding: tuple[int, int, int, int] | None = None,
        bias: bool = True,
        upsample: bool = False,
        norm: GroupNorm | None = None,
        channel_add: Slice | None = None,
        residual: Value | None = None,
        activation: Activation = "none",
    ) -> Value:
        """A convolution; by default with the padding that keeps the size."""
        sources = (sources,) if isinstance(sources, Value) else sources
        margin = size // 2
        top, left, bottom, right = padding = padding or (margin, margin, margin, margin)
        scale = 2 if upsample else 1
        height = (sources[0].height * scale + top + bottom - size) // stride + 1
        width = (sources[0].width * scale + left + right - size) // stride + 1
        batch = max(
            *(source.batch for source in sources),
            1 if channel_add is None else channel_add.value.batch,
            1 if residual is None else residual.batch,
        )
        name, weights, biases = _stacked(path, bias)
        op = Conv(
            name,
            self._value(batch, height, width, channels),
            sources,
            weights,
            biases,
            size,
            stride,
            padding,
            upsample,
            norm,
            channel_add,
            residual,
            activation,
        )
        return self._append(op)

    def linear(
        self,
        path: str | tuple[str, ...],
        source: Value,
        channels: int,
        *,
        bias: bool = True,
        norm: LayerNorm | None = None,
        activation: Activation = "none",
        residual: Value | None = None,
        precise: bool = False,
    ) -> Value:
        """A linear layer of ``channels`` features after the activation."""
        batch = max(source.batch, 1 if residual is None else residual.batch)
        out = self._value(batch, source.height, source.width, channels)
        name, weights, biases = _stacked(path, bias)
        op = Linear(name, out, source, weights, biases, norm, activation, residual, precise)
        return self._append(op)

    def attention(
        self,
        path: str,
        query: Slice,
        key: Slice,
        value: Slice,
        heads: int,
        head_dim: int,
        *,
        causal: bool = False,
    ) -> Value:
        """Attention of all tokens of a row."""
        image = query.value
        batch = max(image.batch, key.value.batch, value.value.batch)
        out = self._value(batch, image.height, image.width, heads * head_dim)
        return self._append(Attention(path, out, query, key, value, heads, head_dim, causal))

    def normalize(
        self, path: str, sources: Value | tuple[Value, ...], norm: GroupNorm | LayerNorm
    ) -> Value:
        """A norm that stands alone."""
        sources = (sources,) if isinstance(sources, Value) else sources
        batch = max(source.batch for source in sources)
        channels = sum(source.channels for source in sources)
        out = self._value(batch, sources[0].height, sources[0].width, channels)
        return self._append(Normalize(path, out, sources, norm))

    def finish(self) -> Program:
        """The program, validated."""
        program = Program(
            tuple(self._values), dict(self._inputs), dict(self._outputs), tuple(self._ops)
        )
        check_program(program)
        return program

    def _value(self, batch: int, height: int, width: int, channels: int) -> Value:
        value = Value(len(self._values), batch, height, width, channels)
        self._values.append(value)
        return value

    def _append(self, op: Op) -> Value:
        self._ops.append(op)
        return op.out


def group_norm(path: str, groups: int, eps: float, *, silu: bool = False) -> GroupNorm:
    """The group norm of a module."""
    return GroupNorm(f"{path}.weight", f"{path}.bias", groups, eps, silu)


def layer_norm(path: str, eps: float) -> LayerNorm:
    """The layer norm of a module."""
    return LayerNorm(f"{path}.weight", f"{path}.bias", eps)


def _stacked(
    path: str | tuple[str, ...], bias: bool
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    paths = (path,) if isinstance(path, str) else path
    weights = tuple(f"{one}.weight" for one in paths)
    return paths[0], weights, tuple(f"{one}.bias" for one in paths) if bias else ()
