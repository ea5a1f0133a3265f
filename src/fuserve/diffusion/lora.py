"""LoRA branches of a program: ``W x`` becomes ``W x + scale * up(down(x))`` (arXiv 2106.09685).

The branch is computed beside the product, whose weights stay as they are, quantized or not.
Branches of several LoRAs, and of the matrices that an operation stacks, are one branch: their
``down`` rows stand below each other, their ``up`` columns beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuserve.diffusion.program import Array, Conv, Linear, Op, Program, Value, Weights
from fuserve.diffusion.program_checks import check_program


@dataclass(frozen=True, slots=True)
class Branch:
    """One LoRA of one module.

    Attributes:
        down: ``[rank, in]``, or ``[rank, in, size, size]`` of a convolution.
        up: ``[out, rank]``, the scale multiplied in.
    """

    down: Array
    up: Array


Branches = Mapping[str, Sequence[Branch]]
"""By the path of the module."""


def with_branches(
    program: Program, branches: Branches, weights: Weights, prefix: str
) -> tuple[Program, dict[str, Array]]:
    """The program with the branches of its modules, and the tensors that these add to its weights.

    Names of the tensors begin with ``prefix``. Branches must fit their modules.
    """
    rewriter = _Rewriter(program, branches, weights, prefix)
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, Conv | Linear) and any(_path(name) in branches for name in op.weight):
            ops += rewriter.branched(op)
        else:
            ops.append(op)
    if not rewriter.tensors:
        return program, {}
    changed = replace(program, values=tuple(rewriter.values), ops=tuple(ops))
    check_program(changed)
    return changed, rewriter.tensors


class _Rewriter:
    def __init__(self, program: Program, branches: Branches, weights: Weights, prefix: str) -> None:
        self._branches, self._weights, self._prefix = branches, weights, prefix
        self.values = list(program.values)
        self.tensors: dict[str, Array] = {}

    def branched(self, op: Conv | Linear) -> list[Op]:
        """Down, up with the operation's own residual, and the operation with that as residual."""
        name = f"{self._prefix}{op.name}"
        down, up = self._stacked(op)
        self.tensors[f"{name}.down"], self.tensors[f"{name}.up"] = down, up
        rows, rank = up.shape
        sources = op.sources if isinstance(op, Conv) else (op.source,)
        batch = max(source.batch for source in sources)
        low = self._value(batch, op.out, rank)
        batch = max(batch, 1 if op.residual is None else op.residual.batch)
        high = self._value(batch, op.out, rows)
        first = replace(
            op,
            name=f"{name}.down",
            out=low,
            weight=(f"{name}.down",),
            bias=(),
            residual=None,
            activation="none",
        )
        if isinstance(first, Conv):
            first = replace(first, channel_add=None)
        second = Linear(f"{name}.up", high, low, (f"{name}.up",), residual=op.residual)
        return [first, second, replace(op, residual=high)]

    def _stacked(self, op: Conv | Linear) -> tuple[Array, Array]:
        """One ``down`` and one ``up`` of all branches of all matrices of the operation."""
        total = op.out.channels * (2 if op.activation == "geglu" else 1)
        downs: list[Array] = []
        ups: list[Array] = []
        first = 0
        for name in op.weight:
            rows = self._weights.shape(name)[0]
            for branch in self._branches.get(_path(name), ()):
                up = np.zeros((total, branch.up.shape[1]), np.float32)
                up[first : first + rows] = branch.up
                downs.append(branch.down)
                ups.append(up)
            first += rows
        return np.concatenate(downs), np.concatenate(ups, axis=1)

    def _value(self, batch: int, like: Value, channels: int) -> Value:
        value = Value(len(self.values), batch, like.height, like.width, channels)
        self.values.append(value)
        return value


def _path(weight: str) -> str:
    return weight.removesuffix(".weight")
