"""The reference executor: a program in plain torch, written to be read and believed.

It is the oracle of the parity tests, and the way to devices that the native core does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fuserve.diffusion.packed_integers import stacked
from fuserve.diffusion.program import (
    Array,
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
    Weights,
)
from fuserve.errors import MissingExtraError

try:
    import torch
    from torch import Tensor
    from torch.nn import functional
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The reference executor") from error

from fuserve.diffusion.quantized_reference import (
    quantized_conv,
    quantized_conv_input,
    quantized_linear,
)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "geglu": _geglu,
}


class ReferenceExecutor:
    """Runs a program, one plain operation after the other. Values are kept as ``[B, H, W, C]``.

    Args:
        program: a validated program.
        weights: tensors are read as they are used; none is kept.
        device: any torch device.
        dtype: a floating type, for weights, values and arithmetic.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.program = program
        self._weights = weights
        self._device = torch.device(device)
        self._dtype = dtype

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, of their values' shapes, from one array for each input."""
        values: dict[Value, Tensor] = {}
        for name, value in self.program.inputs.items():
            values[value] = self._tensor(inputs[name]).view(value.shape)
        last_use = {value: op for op in self.program.ops for value in op.reads()}
        kept = set(self.program.outputs.values())
        for op in self.program.ops:
            result = self._run(op, values)
            values[op.out] = result.reshape(op.out.shape)
            for value in set(op.reads()):
                if last_use[value] is op and value not in kept:
                    del values[value]
        return {
            name: values[value].float().cpu().numpy()
            for name, value in self.program.outputs.items()
        }

    def _run(self, op: Op, values: Mapping[Value, Tensor]) -> Tensor:
        def read(value: Value) -> Tensor:
            """One row for each row of the output."""
            return values[value].repeat_interleave(op.out.batch // value.batch, dim=0)

        match op:
            case Conv():
                return self._conv(op, read)
            case Linear():
                x = self._linear(op, self._normalized(op.norm, read(op.source)))
                if op.residual is not None:
                    x = x + read(op.residual).reshape(x.shape)
                return ACTIVATIONS[op.activation](x)
            case Attention():
                return self._attention(op, read)
            case Normalize():
                return self._normalized(op.norm, torch.cat([read(v) for v in op.sources], dim=-1))

    def _linear(self, op: Linear, x: Tensor) -> Tensor:
        bias = self._bias(op.bias)
        quantized = stacked(self._weights, op.weight)
        if quantized is None:
            return functional.linear(x, self._stack(op.weight), bias)
        x = quantized_linear(quantized, x)
        return x if bias is None else x + bias

    def _conv(self, op: Conv, read: Callable[[Value], Tensor]) -> Tensor:
        x = torch.cat([read(source) for source in op.sources], dim=-1)
        x = self._normalized(op.norm, x)
        quantized = stacked(self._weights, op.weight)
        if quantized is not None:
            x = quantized_conv_input(quantized, x)
        x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
        if op.upsample:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        top, left, bottom, right = op.padding
        x = functional.pad(x, (left, right, top, bottom))
        if quantized is not None:
            x = quantized_conv(quantized, x, op.size, op.stride, self._dtype)
        else:
            weight = self._stack(op.weight)
            x = functional.conv2d(
                x, weight.view(*weight.shape[:2], op.size, op.size), stride=op.stride
            )
        x = x.permute(0, 2, 3, 1)
        if op.bias:
            x = x + self._stack(op.bias)
        if op.channel_add is not None:
            x = x + _channels(read(op.channel_add.value), op.channel_add, op.out.channels)
        if op.residual is not None:
            x = x + read(op.residual).reshape(x.shape)
        return ACTIVATIONS[op.activation](x)

    def _attention(self, op: Attention, read: Callable[[Value], Tensor]) -> Tensor:
        def heads(part: Slice) -> Tensor:
            """[B, heads, tokens, head_dim]."""
            x = _channels(read(part.value), part, op.heads * op.head_dim).flatten(1, 2)
            return x.view(*x.shape[:2], op.heads, op.head_dim).transpose(1, 2)

        scores = heads(op.query) @ heads(op.key).transpose(-1, -2) * op.head_dim**-0.5
        if op.causal:
            is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=self._device).triu(1)
            scores = scores.masked_fill(is_later, float("-inf"))
        context = torch.softmax(scores, dim=-1) @ heads(op.value)
        return context.transpose(1, 2).flatten(2)  # [B, tokens, heads * head_dim]

    def _normalized(self, norm: GroupNorm | LayerNorm | None, x: Tensor) -> Tensor:
        """Of ``x``  # [B, H, W, C]."""
        if norm is None:
            return x
        weight, bias = self._stack((norm.weight,)), self._stack((norm.bias,))
        if isinstance(norm, LayerNorm):
            return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        x = functional.group_norm(x.movedim(-1, 1), norm.groups, weight, bias, norm.eps)
        x = x.movedim(1, -1)
        return functional.silu(x) if norm.silu else x

    def _stack(self, names: tuple[str, ...]) -> Tensor:
        parts = [self._tensor(self._weights.float32(name)) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bias(self, names: tuple[str, ...]) -> Tensor | None:
        return self._stack(names) if names else None

    def _tensor(self, array: Array) -> Tensor:
        if not (array.flags.writeable and array.flags.c_contiguous):
            array = np.array(array)  # torch wants memory that it may write
        return torch.from_numpy(array).to(device=self._device, dtype=self._dtype)


def _channels(x: Tensor, part: Slice, count: int) -> Tensor:
    return x[..., part.first : part.first + count]
