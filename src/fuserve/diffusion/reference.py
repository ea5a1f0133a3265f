"""The reference executor: a program in plain torch, written to be read and believed.

It is the oracle of the parity tests, and the way to devices that the native core does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fuserve.diffusion.program import (
    SUMMED_PIXELS,
    Array,
    Attention,
    ChannelSums,
    Conv,
    GroupNorm,
    ImageSums,
    LayerNorm,
    Linear,
    Move,
    Normalize,
    Op,
    Program,
    Rows,
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
        program = self.program
        values: dict[Value, Tensor] = {}  # those that are no views

        def memory(value: Value) -> Tensor:
            rows = program.views.get(value) or Rows(value, 0)
            if rows.value not in values:
                values[rows.value] = torch.empty(
                    rows.value.shape, dtype=self._dtype, device=self._device
                )
            return values[rows.value][:, rows.first : rows.first + value.height]

        for name, value in program.inputs.items():
            memory(value).copy_(self._tensor(inputs[name]).view(value.shape))
        last_use = {_whole(program, value): op for op in program.ops for value in op.reads()}
        kept = {_whole(program, value) for value in program.outputs.values()}
        for op in program.ops:
            memory(op.out).copy_(self._run(op, memory).reshape(op.out.shape))
            for value in {_whole(program, value) for value in op.reads()} - kept:
                if last_use[value] is op:
                    del values[value]
        return {
            name: memory(value).float().cpu().numpy() for name, value in program.outputs.items()
        }

    def _run(self, op: Op, memory: Callable[[Value], Tensor]) -> Tensor:
        def read(value: Value) -> Tensor:
            """One row for each row of the output."""
            return memory(value).repeat_interleave(op.out.batch // value.batch, dim=0)

        match op:
            case Conv():
                return self._conv(op, read)
            case Linear():
                x = self._normalized(op.norm, read(op.source))
                x = functional.linear(x, self._stack(op.weight), self._bias(op.bias))
                if op.residual is not None:
                    x = x + read(op.residual).reshape(x.shape)
                return ACTIVATIONS[op.activation](x)
            case Attention():
                return self._attention(op, read)
            case Normalize():
                x = torch.cat([read(source) for source in op.sources], dim=-1)
                return self._normalized(op.norm, x, _moments(op.sums, read))
            case ChannelSums():
                return _channel_sums(op, read)
            case Move():
                raise ValueError(f"Move {op.name!r}: this executor has no other ranks")

    def _conv(self, op: Conv, read: Callable[[Value], Tensor]) -> Tensor:
        x = torch.cat([read(source) for source in op.sources], dim=-1)
        x = self._normalized(op.norm, x, _moments(op.sums, read))
        x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
        if op.upsample:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        top, left, bottom, right = op.padding
        x = functional.pad(x, (left, right, top, bottom))
        weight = self._stack(op.weight)
        weight = weight.view(*weight.shape[:2], op.size, op.size)
        x = functional.conv2d(x, weight, self._bias(op.bias), op.stride).permute(0, 2, 3, 1)
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

    def _normalized(
        self, norm: GroupNorm | LayerNorm | None, x: Tensor, moments: Moments | None = None
    ) -> Tensor:
        """Of ``x``  # [B, H, W, C]; a group norm by its channels' moments, or by its own."""
        if norm is None:
            return x
        weight, bias = self._stack((norm.weight,)), self._stack((norm.bias,))
        if isinstance(norm, LayerNorm):
            return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        if moments is None:
            x = functional.group_norm(x.movedim(-1, 1), norm.groups, weight, bias, norm.eps)
            x = x.movedim(1, -1)
        else:
            x = (x - moments.mean(norm.groups)) / (moments.variance(norm.groups) + norm.eps).sqrt()
            x = x * weight + bias
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


@dataclass(frozen=True, slots=True)
class Moments:
    """Means of the channels of an image and of their squares  # [B, 1, 1, C] each."""

    first: Tensor
    second: Tensor

    def mean(self, groups: int) -> Tensor:
        """Of each channel's group  # [B, 1, 1, C]."""
        return _group_means(self.first, groups)

    def variance(self, groups: int) -> Tensor:
        """Of each channel's group  # [B, 1, 1, C]."""
        return _group_means(self.second, groups) - self.mean(groups) ** 2


def _group_means(x: Tensor, groups: int) -> Tensor:
    size = x.shape[-1] // groups
    means = x.view(*x.shape[:-1], groups, size).mean(-1)
    return means.repeat_interleave(size, dim=-1)


def _moments(sums: ImageSums | None, read: Callable[[Value], Tensor]) -> Moments | None:
    if sums is None:
        return None
    firsts, seconds = [], []
    for value in sums.values:
        rows = read(value)  # [B, 1 + chunks, 1, 2 C]
        pivot = rows[:, :1].chunk(2, dim=-1)[0]
        first, second = (rows[:, 1:].sum(1, keepdim=True) / sums.pixels).chunk(2, dim=-1)
        firsts.append(first + pivot)
        seconds.append(second + 2 * pivot * first + pivot**2)
    return Moments(torch.cat(firsts, dim=-1), torch.cat(seconds, dim=-1))


def _channel_sums(op: ChannelSums, read: Callable[[Value], Tensor]) -> Tensor:
    x = read(op.source)  # [B, H, W, C]
    begins = op.pivots is None
    pivots = x[:, 0, :1] if op.pivots is None else read(op.pivots)[:, 0, :, : x.shape[-1]]
    x = functional.pad(x - pivots[:, None], (0, 0, 0, -x.shape[2] % SUMMED_PIXELS))
    x = x.view(len(x), -1, SUMMED_PIXELS, x.shape[-1])  # [B, chunks, 64, C]
    sums = torch.cat([x.sum(2), (x**2).sum(2)], dim=-1)
    first = [torch.cat([pivots, torch.zeros_like(pivots)], dim=-1)] if begins else []
    return torch.cat([*first, sums], dim=1)


def _whole(program: Program, value: Value) -> Value:
    rows = program.views.get(value)
    return value if rows is None else rows.value


def _channels(x: Tensor, part: Slice, count: int) -> Tensor:
    return x[..., part.first : part.first + count]
