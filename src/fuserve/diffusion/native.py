"""Programs run natively: all operations in one call, in memory planned before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fuserve._native import ImageExecutor, ImageProgram, ThreadPool
from fuserve.diffusion.arena import place_values
from fuserve.diffusion.packed_weights import PackedWeights
from fuserve.diffusion.program import (
    Array,
    Attention,
    ChannelSums,
    Conv,
    ImageSums,
    Linear,
    Move,
    Normalize,
    Op,
    Program,
    Slice,
    Value,
)
from fuserve.diffusion.program import GroupNorm as GroupNormSpec
from fuserve.kernels.conv import ConvActivation
from fuserve.kernels.machine import selected_isa

BOUND = -1
"""The offset of values that are bound to arrays at each run."""
NO_VALUE = -1

LINEAR_ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "quick_gelu": 3, "geglu": 4, "relu": 5}
"""As ``csrc/image/program.h`` numbers them."""
CONV_ACTIVATIONS = {
    "none": ConvActivation.NONE,
    "relu": ConvActivation.RELU,
    "silu": ConvActivation.SILU,
}


class NativeWorkspace:
    """The threads and the memory in which programs run, one at a time; shared by any number.

    Args:
        pool: the threads.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self.executor = ImageExecutor(selected_isa())

    def release(self) -> None:
        """Give the memory back; the next run takes what it needs."""
        self.executor.release()


class NativeProgram:
    """A program ready to run.

    Args:
        program: what to run.
        weights: of its checkpoint; packs those that no program has used before.
        workspace: where it runs.

    Raises:
        CheckpointError: a tensor is missing.
        ValueError: an operation is in no form that the kernels have.
    """

    def __init__(
        self, program: Program, weights: PackedWeights, workspace: NativeWorkspace
    ) -> None:
        self._program, self._workspace = program, workspace
        self._native = ImageProgram()
        self._weights = weights
        self._places = place_values(program)
        for value in program.values:
            offset = self._places.get(value, BOUND)
            band = (value.first_row, value.above, value.below)
            self._native.add_value(*value.shape, offset, *band)
        self._from_integers: set[int] = set()
        self._num_native = [0]
        for op in program.ops:
            self._num_native.append(self._num_native[-1] + (not isinstance(op, Move)))
            try:
                self._add(op)
            except ValueError as error:
                raise ValueError(f"{type(op).__name__} {op.name!r}: {error}") from error

    @property
    def program(self) -> Program:
        """The program."""
        return self._program

    @property
    def arena_bytes(self) -> int:
        """Memory of the values between inputs and outputs."""
        return int(self._native.arena_bytes)

    def run(
        self, inputs: Mapping[str, Array], op_seconds: npt.NDArray[np.float64] | None = None
    ) -> dict[str, Array]:
        """All operations; one call, the GIL released.

        Args:
            inputs: by name, of their values' shapes (any that has as many elements will do).
            op_seconds: filled with the time of each operation, or None.  # [ops]

        Raises:
            ValueError: an input is missing, unknown or of another size.
        """
        arrays, outputs = self.bind(inputs)
        self._workspace.executor.run(self._native, self._workspace.pool, arrays, op_seconds)
        return outputs

    def bind(self, inputs: Mapping[str, Array]) -> tuple[dict[int, Array], dict[str, Array]]:
        """Memory of the bound values by index, and the outputs, which are part of it.

        Raises:
            ValueError: an input is missing, unknown or of another size.
        """
        if inputs.keys() != self._program.inputs.keys():
            raise ValueError(f"the inputs are {sorted(self._program.inputs)}, not {sorted(inputs)}")
        arrays: dict[int, Array] = {}
        for name, value in self._program.inputs.items():
            array = np.ascontiguousarray(inputs[name], np.float32)
            if array.size != value.size:
                wanted = list(value.stored_shape)
                raise ValueError(f"input {name!r} is {list(array.shape)}, not {wanted}")
            arrays[value.index] = array
        outputs = {}
        for name, value in self._program.outputs.items():
            if value.index not in arrays:
                arrays[value.index] = np.empty(value.shape, np.float32)
            outputs[name] = arrays[value.index].reshape(value.shape)
        for view, rows in self._program.views.items():
            if rows.value.index in arrays:
                whole = arrays[rows.value.index].reshape(rows.value.shape)
                arrays[view.index] = whole[:, rows.first : rows.first + view.height]
        return arrays, outputs

    def run_part(self, arrays: Mapping[int, Array], first: int, last: int) -> None:
        """Run operations ``[first, last)``; those before have run since, and nothing else.

        Args:
            arrays: of ``bind``.
            first: index into the program's operations.
            last: likewise, not included.
        """
        part = (self._num_native[first], self._num_native[last])
        self._workspace.executor.run(self._native, self._workspace.pool, arrays, None, part)

    def memory(self, arrays: Mapping[int, Array]) -> Callable[[Value], Array]:
        """Where values are, as arrays of their ``stored_shape``, until another program runs."""
        arena = self._workspace.executor.arena(self._native)

        def at(value: Value) -> Array:
            offset = self._places.get(value)
            array = arrays[value.index] if offset is None else arena[offset : offset + value.size]
            return array.reshape(value.stored_shape)

        return at

    def _add(self, op: Op) -> None:
        if isinstance(op, Conv):
            self._add_conv(op)
        elif isinstance(op, Linear):
            norm = None if op.norm is None else self._weights.layer_norm(op.norm)
            weights = self._weights.linear(op)
            # A branch of a LoRA adds floats to what its layer gave.
            if weights.is_integer or _index(op.residual) in self._from_integers:
                self._from_integers.add(op.out.index)
            self._native.add_linear(
                op.out.index,
                op.source.index,
                weights,
                norm,
                _index(op.residual),
                LINEAR_ACTIVATIONS[op.activation],
            )
        elif isinstance(op, Attention):
            parts = (_slice(part) for part in (op.query, op.key, op.value))
            # Where queries were rounded to 8 bits before, rounding them to 12 costs nothing.
            in_pairs = not op.causal and op.query.value.index in self._from_integers
            self._native.add_attention(
                op.out.index, *parts, op.heads, op.head_dim, op.causal, in_pairs
            )
        elif isinstance(op, ChannelSums):
            self._native.add_channel_sums(op.out.index, op.source.index, _index(op.pivots))
        elif isinstance(op, Move):
            pass  # somebody does it between two parts of a run
        else:
            self._add_normalize(op)

    def _add_conv(self, op: Conv) -> None:
        if op.activation not in CONV_ACTIVATIONS:
            raise ValueError(f"convolutions have no activation {op.activation!r}")
        self._native.add_conv(
            op.out.index,
            [source.index for source in op.sources],
            self._weights.conv(op),
            None if op.norm is None else self._weights.group_norm(op.norm),
            (NO_VALUE, 0) if op.channel_add is None else _slice(op.channel_add),
            _index(op.residual),
            int(CONV_ACTIVATIONS[op.activation]),
            *_sums(op.sums),
        )

    def _add_normalize(self, op: Normalize) -> None:
        if isinstance(op.norm, GroupNormSpec):
            sources = [source.index for source in op.sources]
            norm = self._weights.group_norm(op.norm)
            self._native.add_group_norm(op.out.index, sources, norm, *_sums(op.sums))
        else:
            layer = self._weights.layer_norm(op.norm)
            self._native.add_layer_norm(op.out.index, op.sources[0].index, layer)


def _index(value: Value | None) -> int:
    return NO_VALUE if value is None else value.index


def _slice(part: Slice) -> tuple[int, int]:
    return (part.value.index, part.first)


def _sums(sums: ImageSums | None) -> tuple[list[int], int]:
    return ([], 0) if sums is None else ([value.index for value in sums.values], sums.pixels)
