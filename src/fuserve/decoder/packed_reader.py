"""Native handles of the tensors in packed memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve._native import Norm, PackedLinear
from fuserve.architectures import NormSpec
from fuserve.decoder.model_part import PART_MARK, ModelPart
from fuserve.decoder.packed_file import Memory
from fuserve.decoder.storage_plan import HEAD_WISE, PlannedTensor, place_of
from fuserve.kernels.linear import InputKind, LinearInput, packed_linear


def input_kind(tensor: PlannedTensor) -> InputKind:
    """What the kernels make of the input of a planned linear weight."""
    if tensor.activations == "token" and tensor.outlier_threshold is not None:
        return InputKind.OUTLIERS
    return {
        "float": InputKind.FLOATS,
        "block": InputKind.BLOCKS,
        "token": InputKind.TOKEN,
        "tensor": InputKind.FIXED,
    }[tensor.activations]


@dataclass(frozen=True, slots=True)
class NativeRowSplit:
    """A linear weight in pieces of its inputs, whose products are added, then the bias.

    ``bias`` has zeros where tiles have padding rows, like ``packed_linear``'s.
    """

    parts: list[PackedLinear]
    bias: npt.NDArray[np.float32] | None


class PackedReader:
    """Native handles of the tensors in packed memory."""

    def __init__(
        self,
        memory: Memory,
        plan: Mapping[str, PlannedTensor],
        part: ModelPart,
    ) -> None:
        self._memory = memory
        self._plan = plan
        self._part = part
        self._multipliers: dict[str, npt.NDArray[np.float32]] = {}

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """The float32 values of a planned vector or table."""
        tensor = self._plan[name]
        data = self._memory[tensor.offset : tensor.offset + tensor.num_bytes]
        return data.view(np.float32).reshape(tensor.shape)

    def optional_array(self, name: str) -> npt.NDArray[np.float32] | None:
        """The same, or None where the plan has no such tensor."""
        return self.array(name) if name in self._plan else None

    def norm(self, name: str, norm: NormSpec) -> Norm:
        """A norm with its weight and bias."""
        bias = self.optional_array(name + ".bias")
        return Norm(norm.kind == "layer", norm.eps, self.array(name), bias)

    def optional_norm(self, name: str, norm: NormSpec | None) -> Norm | None:
        """The same, or None where the plan has no such norm."""
        return self.norm(name, norm) if norm is not None and name in self._plan else None

    def linear(self, name: str, bias_name: str | None = None) -> PackedLinear:
        """A linear weight with its bias, and what is done to its input."""
        return self._weights(name, self._bias(name, bias_name or name + ".bias", name))

    def row_split(self, name: str) -> NativeRowSplit:
        """A linear weight whose inputs are divided, among ranks or in pieces of this one."""
        parts = [one for one in self._plan if one == name or one.startswith(name + PART_MARK)]
        parts = [one for one in parts if self._plan[one].vector_of is None]
        bias = self._bias(name, name + ".bias", parts[0])
        return NativeRowSplit([self._weights(one, None) for one in parts], bias)

    def _weights(self, name: str, bias: npt.NDArray[np.float32] | None) -> PackedLinear:
        tensor = self._plan[name]
        assert tensor.storage is not None
        rows, cols = tensor.shape
        shape = tensor.storage.shape(rows, cols, tensor.row_group)
        data = self._memory[tensor.offset : tensor.offset + tensor.num_bytes]
        return packed_linear(shape, data, bias, self._input(tensor))

    def _bias(self, name: str, bias_name: str, shifted: str) -> npt.NDArray[np.float32] | None:
        """What is added to the outputs: the bias, and the share of ``shifted``'s input shift."""
        bias = self.optional_array(bias_name)
        shift = self.optional_array(shifted + ".output_shift")
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return None if bias is None else self._padded(bias, name)

    def _input(self, tensor: PlannedTensor) -> LinearInput:
        shift = place_of(tensor.name, "input_shift", self._plan)
        smoothing = place_of(tensor.name, "input_smoothing", self._plan)
        multiplier = None
        if smoothing is not None:
            # One array for all linears of an input, so that the native core sees that it is one.
            multiplier = self._multipliers.setdefault(
                smoothing.name, np.float32(1) / self.array(smoothing.name)
            )
        scale = place_of(tensor.name, "input_scale", self._plan)
        return LinearInput(
            input_kind(tensor),
            scale=float(self.array(scale.name)[0]) if scale is not None else 0.0,
            threshold=tensor.outlier_threshold or 0.0,
            shift=self.array(shift.name) if shift is not None else None,
            multiplier=multiplier,
        )

    def optional_linear(self, name: str) -> PackedLinear | None:
        """The same, or None where the plan has no such weight."""
        return self.linear(name) if name in self._plan else None

    def _padded(self, bias: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
        """The bias with zeros where the weight's tiles have padding rows."""
        groups = bias.size
        if name.endswith(HEAD_WISE):
            groups = self._part.spec.attention.head_dim
        split = bias.reshape(-1, groups)
        padded = np.zeros((split.shape[0], -(-groups // 16) * 16), np.float32)
        padded[:, :groups] = split
        return padded.reshape(-1)

    def bytes_read_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: all but an embedding that is no head."""
        total = sum(t.num_bytes for t in self._plan.values() if t.storage is not None)
        is_head = self._part.whole.tied_head and self._part.is_last_stage
        if is_head or not self._part.is_first_stage:
            return total
        return total - self._plan["embedding"].num_bytes
