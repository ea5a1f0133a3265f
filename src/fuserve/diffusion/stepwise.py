"""A program run one operation at a time, so that what its layers read can be seen, or changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fuserve.diffusion.network import Backend, ExecutorMaker
from fuserve.diffusion.program import (
    Array,
    Attention,
    ChannelSums,
    Conv,
    Executor,
    Linear,
    Move,
    Normalize,
    Op,
    Program,
    Slice,
    Value,
    Weights,
    sources_of,
)
from fuserve.diffusion.program_checks import check_program

Tap = Callable[[Conv | Linear, Array], Array]
"""Takes a layer and what it reads, after its norm, sources side by side  # [B, H, W, in]. Returns
what it shall read: the same, or other values."""


class StepwiseExecutor:
    """Runs a program operation by operation, each as a program of its own.

    It computes what the program computes; no more values are held than are still to be read. Norms
    run apart from the layers that they belong to, and what those read goes through the tap.

    Args:
        program: what to run.
        make: makes the executors of the operations.
        tap: sees the inputs of all convolutions and linears.
    """

    def __init__(self, program: Program, make: ExecutorMaker, tap: Tap) -> None:
        self._program, self._tap = program, tap
        self._steps = [_step(op, make) for op in program.ops]
        self._last_use = {value: op for op in program.ops for value in op.reads()}

    @property
    def program(self) -> Program:
        """The program."""
        return self._program

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, of their values' shapes, from one array for each input."""
        program = self._program
        values = {value: inputs[name] for name, value in program.inputs.items()}
        kept = set(program.outputs.values())
        for op, step in zip(program.ops, self._steps, strict=True):
            values[op.out] = step.run(values, self._tap)
            for value in set(op.reads()):
                if self._last_use[value] is op and value not in kept:
                    del values[value]
        return {name: values[value] for name, value in program.outputs.items()}


def tapped(backend: Backend, tap: Tap) -> Backend:
    """The backend with programs run one operation at a time."""
    return lambda weights: _TappedMaker(weights, backend, tap)


class _TappedMaker(ExecutorMaker):
    def __init__(self, weights: Weights, backend: Backend, tap: Tap) -> None:
        self._make, self._tap = backend(weights), tap

    def __call__(self, program: Program) -> Executor:
        return StepwiseExecutor(program, self._make, self._tap)

    def forget(self, names: Collection[str]) -> None:
        self._make.forget(names)

    def release(self) -> None:
        self._make.release()


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation; for a layer also what computes its input, ``read``.

    Attributes:
        op: as it stands in the program.
        norm: its norm alone, None where it has none.
        executor: runs the operation; a layer reads the input ``x`` instead of its sources.
    """

    op: Op
    norm: Executor | None
    executor: Executor

    def run(self, values: Mapping[Value, Array], tap: Tap) -> Array:
        op = self.op
        inputs = {_name(value): values[value] for value in op.reads()}
        if isinstance(op, Conv | Linear):
            sources = sources_of(op)
            if self.norm is not None:
                x = self.norm.run({_name(value): values[value] for value in sources})["out"]
            else:
                x = _side_by_side(sources, values)
            inputs = {name: inputs[name] for name in self.executor.program.inputs if name != "x"}
            inputs["x"] = tap(op, x)
        return self.executor.run(inputs)["out"]


def _step(op: Op, make: ExecutorMaker) -> _Step:
    if not isinstance(op, Conv | Linear):
        return _Step(op, None, make(_alone(op)))
    sources = sources_of(op)
    first = sources[0]
    batch = max(source.batch for source in sources)
    channels = sum(source.channels for source in sources)
    x = Value(-1, batch, first.height, first.width, channels)
    norm = None
    if op.norm is not None:
        norm = make(_alone(Normalize(op.name, x, sources, op.norm)))
    layer: Conv | Linear
    if isinstance(op, Conv):
        layer = replace(op, sources=(x,), norm=None)
    else:
        layer = replace(op, source=x, norm=None)
    return _Step(op, norm, make(_alone(layer)))


def _alone(op: Op) -> Program:
    """The operation as a program with the output ``out`` and inputs as ``_name`` names them."""
    old = list(dict.fromkeys((*op.reads(), op.out)))
    new = {value: replace(value, index=index) for index, value in enumerate(old)}
    inputs = {_name(value): new[value] for value in old if value != op.out}
    moved = _moved(op, new)
    program = Program(tuple(new.values()), inputs, {"out": new[op.out]}, (moved,))
    check_program(program)
    return program


def _moved(op: Op, new: Mapping[Value, Value]) -> Op:
    """The operation over the values of another program."""

    def part(old: Slice) -> Slice:
        return replace(old, value=new[old.value])

    out = new[op.out]
    match op:
        case Conv():
            return replace(
                op,
                out=out,
                sources=tuple(new[source] for source in op.sources),
                channel_add=None if op.channel_add is None else part(op.channel_add),
                residual=None if op.residual is None else new[op.residual],
            )
        case Linear():
            residual = None if op.residual is None else new[op.residual]
            return replace(op, out=out, source=new[op.source], residual=residual)
        case Attention():
            query, key, value = part(op.query), part(op.key), part(op.value)
            return replace(op, out=out, query=query, key=key, value=value)
        case Normalize():
            return replace(op, out=out, sources=tuple(new[source] for source in op.sources))
        case ChannelSums() | Move():
            raise ValueError(f"{op.name!r}: programs in bands do not run one operation at a time")


def _name(value: Value) -> str:
    return "x" if value.index < 0 else str(value.index)


def _side_by_side(sources: tuple[Value, ...], values: Mapping[Value, Array]) -> Array:
    """The sources' channels concatenated, as many rows of each as the largest batch has."""
    if len(sources) == 1:
        return values[sources[0]].reshape(sources[0].shape)
    batch = max(source.batch for source in sources)
    arrays = [values[source].reshape(source.shape) for source in sources]
    return np.concatenate([x.repeat(batch // len(x), axis=0) for x in arrays], axis=-1)
