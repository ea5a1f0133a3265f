"""fuserve's programs of a UNet or a decoder, with the time that each kind of operation takes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from image_worker import TIMESTEP, TOKENS, Array, ImageWork, run
from rounded_weights import RoundedWeights

from fuserve._native import ThreadPool
from fuserve.architectures.fields import Fields
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.banding import fit
from fuserve.diffusion.memory_plan import DECODE_BYTES
from fuserve.diffusion.native import NativeProgram, NativeWorkspace
from fuserve.diffusion.packed_weights import PackedWeights, PackingOptions
from fuserve.diffusion.program import Attention, Conv, Linear, Op, Program, Weights
from fuserve.diffusion.unet_program import prompt_program, sinusoids, time_program, unet_program
from fuserve.diffusion.unet_spec import UNetSpec, unet_spec
from fuserve.diffusion.vae_program import vae_decoder_program
from fuserve.diffusion.vae_spec import vae_spec
from fuserve.diffusion.weights import CheckpointWeights
from fuserve.kernels.linear import Storage, WeightFormat


class Fuserve:
    """A program and its inputs.

    ``--option half=1`` keeps weights as float16, ``--option input_scales=FILE`` rounds them to
    int8, with these scales for the inputs of convolutions. Decoding takes the memory that it takes
    in an image model, ``--option whole=1`` as much as is fastest.
    """

    def __init__(self, work: ImageWork) -> None:
        fields = Fields(json.loads((work.folder / "config.json").read_text()))
        stored = StoredTensors.of_file(work.folder / "diffusion_pytorch_model.safetensors")
        half = bool(work.option("half"))
        options = PackingOptions(
            linear=Storage(WeightFormat.F16 if half else WeightFormat.F32),
            half_conv=half,
            exact_conv=bool(work.option("exact_conv")),
        )
        pool = ThreadPool(work.threads)
        self.workspace = NativeWorkspace(pool)
        weights: Weights = CheckpointWeights(stored)
        if scales := work.option("input_scales"):
            weights = RoundedWeights(
                weights, unet_spec(fields), json.loads(Path(scales).read_text())
            )
        self.weights = PackedWeights(weights, pool, options)
        side = work.size // 8
        self.inputs = {"latents": work.latents()}
        if work.part == "unet":
            spec = unet_spec(fields)
            self.program = self.ready(unet_program(spec, 1, 2, side, side, tokens=TOKENS))
            self.inputs |= self.ready(prompt_program(spec, 2, TOKENS)).run({"text": work.text()})
            self.inputs |= self.ready(time_program(spec, 1)).run({"time": _time(spec)})
        else:
            decoder = vae_decoder_program(vae_spec(fields), 1, side, side)
            self.program = self.ready(
                decoder if work.option("whole") else fit(decoder, DECODE_BYTES)
            )
        self.op_seconds = np.zeros(len(self.program.program.ops))

    def ready(self, program: Program) -> NativeProgram:
        return NativeProgram(program, self.weights, self.workspace)

    def run(self) -> Array:
        (result,) = self.program.run(self.inputs, self.op_seconds).values()
        return result

    def details(self) -> dict[str, Any]:
        kinds: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for op, seconds in zip(self.program.program.ops, self.op_seconds, strict=True):
            kind = kinds[_kind(op)]
            kind[0] += 1
            kind[1] += seconds
            kind[2] += operations(op)
        return {
            "arena_bytes": self.program.arena_bytes,
            "packed_bytes": self.weights.packed_bytes,
            "operations": [
                {"kind": kind, "count": count, "seconds": seconds, "operations": total}
                for kind, (count, seconds, total) in kinds.items()
            ],
        }


def _time(spec: UNetSpec) -> Array:
    steps = np.array([TIMESTEP], np.float32)
    order = {"sin_first": spec.sin_first, "freq_shift": spec.freq_shift}
    return sinusoids(steps, spec.time_channels, **order)


def _kind(op: Op) -> str:
    if isinstance(op, Conv):
        form = "upsample, " if op.upsample else "stride 2, " if op.stride == 2 else ""
        return f"conv {op.size}x{op.size}, {form}{op.out.height} rows"
    if isinstance(op, Linear):
        return f"linear{' geglu' if op.activation == 'geglu' else ''}, {op.out.height} rows"
    if isinstance(op, Attention):
        return f"attention, {op.key.value.tokens} keys of {op.head_dim}"
    return "norm"


def operations(op: Op) -> float:
    """Multiplications and additions of the plain algorithm, without norms and activations."""
    pixels = op.out.batch * op.out.tokens
    if isinstance(op, Conv):
        inputs = sum(source.channels for source in op.sources) * op.size**2
        return 2.0 * pixels * op.out.channels * inputs
    if isinstance(op, Linear):
        rows = op.out.channels * (2 if op.activation == "geglu" else 1)
        return 2.0 * pixels * rows * op.source.channels
    if isinstance(op, Attention):
        return 4.0 * pixels * op.key.value.tokens * op.heads * op.head_dim
    return 0.0


if __name__ == "__main__":
    run(Fuserve)
