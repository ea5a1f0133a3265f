"""How a diffusion model is held so that it fits into a budget, and what each part of it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from fuserve.diffusion.arena import program_bytes
from fuserve.diffusion.banding import fit
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.packed_weights import PackingOptions
from fuserve.diffusion.parts import ModelParts
from fuserve.diffusion.program import Conv, Linear, Program, Weights
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.unet_program import prompt_program, time_program, unet_program
from fuserve.diffusion.vae_program import decoder_program
from fuserve.errors import CapacityError
from fuserve.kernels.linear import Storage, WeightFormat

PROCESS_BYTES = 250_000_000
"""Interpreter, libraries, the threads' scratch memory, prompts that are kept, a tokenizer."""

DECODE_BYTES = 1_500_000_000
"""What decoding may take beside the weights where no budget is given."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes, in bytes.

    Attributes:
        budget: what it may take.
        weights: packed, without those that only encode images.
        values: of the larger of a guided evaluation and a decoding, at the model's own size.
        packing: how weights are kept.
    """

    budget: int
    weights: int
    values: int
    packing: PackingOptions
    _parts: ModelParts
    _checked: set[tuple[int, int]] = field(default_factory=set)

    @property
    def decode_bytes(self) -> int:
        """What a decoding may take beside the weights."""
        return self.budget - PROCESS_BYTES - self.weights

    @property
    def total(self) -> int:
        """All that is planned for."""
        return PROCESS_BYTES + self.weights + self.values

    def describe(self) -> str:
        """The sum, in a line."""
        dtype = "float16" if self.packing.half_conv else "float32"
        return f"{_sum(self.weights, self.values, dtype)} of {_gigabytes(self.budget)}"

    def check_size(self, height: int, width: int) -> None:
        """Check that pictures of a size in latents fit.

        Raises:
            CapacityError: they do not.
        """
        if (height, width) in self._checked:
            return
        needed = _values(self._parts, height, width, self.decode_bytes)
        if needed > self.decode_bytes:
            more = self.budget + needed - self.decode_bytes
            raise CapacityError(
                f"A picture of this size takes {_gigabytes(needed)} beside the weights; the memory "
                f"budget of {_gigabytes(self.budget)} leaves {_gigabytes(self.decode_bytes)}. Ask "
                f"for a smaller one, or give {_gigabytes(more)}."
            )
        self._checked.add((height, width))


def plan_memory(parts: ModelParts, options: DiffusionOptions, budget: int) -> MemoryPlan:
    """The fastest way to hold a model that fits into a budget.

    float32 weights are preferred to float16 ones (where ``options.dtype`` leaves the choice).
    Nothing depends on sizes that are asked for later, so that images do not.

    Raises:
        CapacityError: nothing fits; it says what would.
    """
    side = parts.unet.spec.sample_size
    values = _values(parts, side, side, 0)
    sums = []
    for name in ("float32", "float16") if options.dtype == "auto" else (options.dtype,):
        packing = packing_options(replace(options, dtype=name))
        weights = _total(parts, packing)
        sums.append(_sum(weights, values, name))
        room = budget - PROCESS_BYTES - weights
        if values <= room:
            return MemoryPlan(budget, weights, _values(parts, side, side, room), packing, parts)
    scale = 1 if parts.vae is None else parts.vae.spec.scale_factor
    raise CapacityError(
        f"{_gigabytes(budget)} of memory are too little for this model, which makes pictures of "
        f"{side * scale} x {side * scale}: it takes {', or '.join(sums)}. Give as much"
        + ("." if options.dtype != "float32" else ", or dtype float16, or a quantized model.")
    )


def packing_options(options: DiffusionOptions) -> PackingOptions:
    """How weights are kept where no budget says otherwise."""
    half = options.dtype == "float16"
    return PackingOptions(
        linear=Storage(WeightFormat.F16 if half else WeightFormat.F32),
        half_conv=half,
        exact_conv=options.exact_conv,
    )


def _values(parts: ModelParts, height: int, width: int, decode_bytes: int) -> int:
    """What a guided evaluation and a decoding take beside the weights: the larger."""
    needed = program_bytes(_denoising(parts, height, width))
    if parts.vae is None:
        return needed
    decoder = decoder_program(parts.vae.spec, 1, height, width)
    return max(needed, program_bytes(fit(decoder, max(needed, decode_bytes))))


def _denoising(parts: ModelParts, height: int, width: int) -> Program:
    tokens = parts.texts[0].tokenizer.max_tokens
    return unet_program(parts.unet.spec, 1, 2, height, width, tokens=tokens)


def _networks(parts: ModelParts) -> Iterator[tuple[Weights, tuple[Program, ...]]]:
    """The weights of each network, and programs at the model's own size that use all of them."""
    spec, side = parts.unet.spec, parts.unet.spec.sample_size
    denoising = _denoising(parts, side, side)
    yield parts.unet.weights, (denoising, prompt_program(spec, 1, 1), time_program(spec, 1))
    for part in parts.texts:
        yield part.weights, (text_encoder_program(part.spec, 1, 1),)
    if parts.vae is not None:
        yield parts.vae.weights, (decoder_program(parts.vae.spec, 1, side, side),)


def _total(parts: ModelParts, packing: PackingOptions) -> int:
    return sum(weight_bytes(programs, weights, packing) for weights, programs in _networks(parts))


def weight_bytes(programs: Iterable[Program], weights: Weights, packing: PackingOptions) -> int:
    """What the packed weights of a network's programs take."""
    sizes: dict[tuple[str, ...], int] = {}
    for program in programs:
        for op in program.ops:
            if not isinstance(op, Conv | Linear) or op.weight in sizes:
                continue
            integers = [one for name in op.weight if (one := weights.quantized(name)) is not None]
            if integers:
                sizes[op.weight] = sum(
                    one.values.size * one.bits // 8 + one.scales.nbytes for one in integers
                )
            elif isinstance(op, Conv):
                sizes[op.weight] = packing.conv_shape(op).packed_bytes
            else:
                rows = op.out.channels * (2 if op.activation == "geglu" else 1)
                shape = packing.storage(op).shape(rows, op.source.channels)
                sizes[op.weight] = shape.packed_bytes
    return sum(sizes.values())


def _sum(weights: int, values: int, dtype: str) -> str:
    total = PROCESS_BYTES + weights + values
    return (
        f"{_gigabytes(total)} (weights as {dtype} {_gigabytes(weights)} + a picture "
        f"{_gigabytes(values)} + process {_gigabytes(PROCESS_BYTES)})"
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
