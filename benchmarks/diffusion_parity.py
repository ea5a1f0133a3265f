"""Do our networks equal diffusers' at full size? Random weights of the published configs, fp32.

    python benchmarks/diffusion_parity.py --model sd15 --size 256 --steps 20
    python benchmarks/diffusion_parity.py --model sdxl --size 256 --steps 2
    python benchmarks/diffusion_parity.py --model vae --size 512
    python benchmarks/diffusion_parity.py --model clip-l

Of a UNet, prints the largest error of each block's output in one guided evaluation, as a part of
the output's largest value, and the PSNR of the latents after all steps from the same noise and
embeddings; of the others, the error of their output. The oracle runs first; its weights are let go
of as ours are packed, so SDXL takes 14 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from fuserve.architectures.fields import Fields
from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.options import DiffusionOptions
from fuserve.diffusion.packed_weights import PackingOptions
from fuserve.diffusion.program import Array, Program
from fuserve.diffusion.single_file import SD15, SDXL
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.text_encoder_spec import text_encoder_spec
from fuserve.diffusion.unet_program import (
    prompt_program,
    sinusoids,
    time_program,
    unet_program,
)
from fuserve.diffusion.unet_spec import UNetSpec, unet_spec
from fuserve.diffusion.vae_program import vae_decoder_program
from fuserve.diffusion.vae_spec import vae_spec
from fuserve.diffusion.weights import ArrayWeights

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": dict(SD15.unet),
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": dict(SDXL.unet),
}
TOKENS = 77
GUIDANCE_SCALE = 7.5
Predict = Callable[[torch.Tensor, int], torch.Tensor]


class PassingWeights(ArrayWeights):
    """The oracle's weights, each gone once it has been packed."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        super().__init__(arrays)
        self._mine = arrays
        self._shapes = {name: array.shape for name, array in arrays.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, also when it is gone."""
        return self._shapes[name]

    def release(self, name: str) -> None:
        """It has been packed."""
        self._mine.pop(name, None)


def guided_steps(predict: Predict, latents: torch.Tensor, steps: int) -> torch.Tensor:
    """DDIM from the latents; ``predict`` gives [negative, positive]."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        print(f"\rstep {index + 1} of {steps}", end="", file=sys.stderr, flush=True)
        negative, positive = predict(latents, timestep).chunk(2)
        guided = negative + GUIDANCE_SCALE * (positive - negative)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    print(file=sys.stderr)
    return latents


def with_block_outputs(program: Program, spec: UNetSpec) -> Program:
    """The program, giving out what each block gives."""
    outputs = dict(program.outputs)
    for block in spec.blocks:
        ops = [op for op in program.ops if op.name.startswith(f"{block.path}.")]
        outputs[block.path] = ops[-1].out
    return replace(program, outputs=outputs)


def oracle(
    model: UNet2DConditionModel, spec: UNetSpec, text: torch.Tensor, added: dict[str, Any]
) -> tuple[Predict, dict[str, torch.Tensor]]:
    """diffusers' prediction, and where its blocks' outputs are after it."""
    blocks: dict[str, torch.Tensor] = {}
    for block in spec.blocks:

        def keep(_module: Any, _inputs: Any, output: Any, path: str = block.path) -> None:
            blocks[path] = (output[0] if isinstance(output, tuple) else output).clone()

        model.get_submodule(block.path).register_forward_hook(keep)

    def predict(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        with torch.inference_mode():
            pair = latents.repeat(2, 1, 1, 1)
            return model(pair, timestep, text, added_cond_kwargs=added).sample

    return predict, blocks


def main() -> None:
    """Run both and print the table, and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=(*CONFIGS, "vae", "clip-l"), default="sd15")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--folder", type=Path, help="of a UNet that diffusers wrote, to begin at once"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model == "vae":
        errors = decoder_errors(options.size)
        result: dict[str, Any] = {"errors": errors}
    elif options.model == "clip-l":
        errors = text_errors()
        result = {"errors": errors}
    else:
        result = unet_result(options.model, options.size, options.steps, options.folder)
        errors = result["errors"]
    for path, one in errors.items():
        print(f"{path:16} {one:.1e}")
    if "psnr_db" in result:
        print(f"PSNR after {options.steps} steps: {result['psnr_db']:.1f} dB")
        print(
            f"seconds: diffusers {result['seconds']['diffusers']:.1f} (one evaluation more), "
            f"fuserve {result['seconds']['fuserve']:.1f}"
        )
    print(json.dumps({"model": options.model, "size": options.size, **result}))


def decoder_errors(size: int) -> dict[str, float]:
    """Of Stable Diffusion 1.5's decoder."""
    model = AutoencoderKL(**SD15.vae).eval()
    latents = torch.randn(1, 4, size // 8, size // 8)
    with torch.inference_mode():
        expected = model.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    weights = PassingWeights({name: one.numpy() for name, one in model.state_dict().items()})
    del model
    program = vae_decoder_program(vae_spec(Fields(dict(SD15.vae))), 1, size // 8, size // 8)
    native = make_backend(DiffusionOptions(), PackingOptions())(weights)(program)
    found = native.run({"latents": np.ascontiguousarray(latents.permute(0, 2, 3, 1).numpy())})
    return {"image": relative_error(found["image"], expected)}


def text_errors() -> dict[str, float]:
    """Of CLIP-L, whose token embeddings are both sides' input."""
    config = CLIPTextConfig(**SD15.texts[0])
    model = CLIPTextModel(config).eval()
    tokens = torch.randint(0, config.vocab_size - 2, (2, TOKENS))
    with torch.inference_mode():
        expected = model(tokens).last_hidden_state.numpy()
    state = model.state_dict()
    prefix = "" if any(name.startswith("text_model.") for name in state) else "text_model."
    weights = ArrayWeights({prefix + name: one.numpy() for name, one in state.items()})
    embeddings = "text_model.embeddings.{}_embedding.weight"
    embedded = weights.float32(embeddings.format("token"))[tokens.numpy()]
    embedded = embedded + weights.float32(embeddings.format("position"))[:TOKENS]
    program = text_encoder_program(
        text_encoder_spec(Fields(config.to_dict()), projected=False), 2, TOKENS
    )
    native = make_backend(DiffusionOptions(), PackingOptions())(weights)(program)
    found = native.run({"embeddings": embedded})["last"].reshape(expected.shape)
    return {"hidden": relative_error(found, expected)}


def relative_error(found: Array, expected: Array) -> float:
    """The largest difference, as a part of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def unet_result(name: str, size: int, steps: int, folder: Path | None) -> dict[str, Any]:
    """Errors of the blocks, and PSNR and times of all steps."""
    config, side = CONFIGS[name], size // 8
    spec = unet_spec(Fields(config))
    if folder is None:
        model = UNet2DConditionModel(**config).eval()
    else:
        model = UNet2DConditionModel.from_pretrained(folder).eval()
    latents = torch.randn(1, spec.in_channels, side, side)
    text = torch.randn(2, TOKENS, spec.text_channels)
    added, time_inputs, rows = added_conditions(spec, size)

    predict, theirs = oracle(model, spec, text, added)
    started = time.perf_counter()
    prediction = predict(latents, 481)
    theirs = dict(theirs) | {"prediction": prediction}
    expected = guided_steps(predict, latents, steps)
    seconds = time.perf_counter() - started

    weights = PassingWeights({name: one.numpy() for name, one in model.state_dict().items()})
    del model, predict
    make = make_backend(DiffusionOptions(), PackingOptions())(weights)
    states = make(prompt_program(spec, 2, TOKENS)).run({"text": text.numpy()})
    program = unet_program(spec, 1, 2, side, side, tokens=TOKENS, time_rows=rows)
    times = make(time_program(spec, rows))

    def inputs(sample: torch.Tensor, timestep: int) -> dict[str, Array]:
        embedded = sinusoids(np.full(rows, timestep, np.float32), spec.time_channels)
        row = times.run({"time": embedded, **time_inputs})["time"]
        image = np.ascontiguousarray(sample.permute(0, 2, 3, 1).numpy())
        return {**states, "time": row, "latents": image}

    probed = make(with_block_outputs(program, spec)).run(inputs(latents, 481))
    errors = {}
    for path, value in theirs.items():
        wide = value.permute(0, 2, 3, 1).numpy()
        errors[path] = relative_error(probed[path], wide)
    native = make(program)

    def ours(sample: torch.Tensor, timestep: int) -> torch.Tensor:
        pair = native.run(inputs(sample, timestep))["prediction"]
        return torch.from_numpy(pair).permute(0, 3, 1, 2)

    started = time.perf_counter()
    found = guided_steps(ours, latents, steps)
    own_seconds = time.perf_counter() - started
    error = float(((found - expected) ** 2).mean())
    span = float(expected.max() - expected.min())
    psnr = 10 * np.log10(span**2 / error) if error else float("inf")
    return {
        "steps": steps,
        "errors": errors,
        "psnr_db": float(psnr),
        "seconds": {"diffusers": seconds, "fuserve": own_seconds},
    }


def added_conditions(spec: UNetSpec, size: int) -> tuple[dict[str, Any], dict[str, Array], int]:
    """SDXL's pooled text and sizes for diffusers and for us, and the rows of the time embedding."""
    if spec.text_time is None:
        return {}, {}, 1
    dim = spec.text_time.time_dim
    pooled = torch.randn(2, spec.text_time.in_channels - 6 * dim)
    sizes = torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=torch.float32)
    embedded = sinusoids(sizes.numpy().reshape(-1), dim).reshape(2, -1)
    own = {"added": np.concatenate([pooled.numpy(), embedded], axis=1)}
    return {"text_embeds": pooled, "time_ids": sizes}, own, 2


if __name__ == "__main__":
    main()
