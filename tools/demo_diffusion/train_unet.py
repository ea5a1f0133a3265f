"""Stage 3: the UNet, on latents encoded once; the text encoder stays as it is.

Velocity prediction (Salimans and Ho 2022), an empty caption for one in ten samples so that
classifier-free guidance works (Ho and Salimans 2022), an exponential moving average of the
weights. Scenes are tidy, so a caption says nearly all of the picture and each of its words is worth
much of the loss. At high noise the UNet has only the caption to go by: most timesteps are drawn
from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo_diffusion import network, ranks, scenes
from tools.demo_diffusion.train_autoencoder import to_tensor

SPREAD = 0.25  # of the scenes, see scenes.place
STEPS = 7250
BATCHES = {0: 16, 2000: 32}  # scenes a step, from a step on: small ones learn soonest
RATES = ((0, 200, 5000, 6000, STEPS), (0.0, 1e-3, 1e-3, 7.5e-4, 0.0))  # steps, learning rates
TIMES = ((0.0, 0.25, 1.0), (0.0, 0.5, 1.0))  # shares of the draws, of the timesteps from low noise
EMPTY_CAPTIONS = 0.1
EMA_DECAY = 0.997


@dataclass(frozen=True)
class Encoded:
    """The data set as the network sees it."""

    latents: torch.Tensor  # float16 [scenes, 4, 16, 16], scaled
    tokens: torch.Tensor  # int64 [scenes, MAX_TOKENS]
    empty: torch.Tensor  # int64 [MAX_TOKENS], the empty caption


@torch.no_grad()
def encode(model: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int) -> Encoded:
    """Paint ``count`` scenes and encode them.

    Sets the autoencoder's ``scaling_factor``, for latents of standard deviation 1.
    """
    rng = np.random.default_rng([seed, 2, ranks.rank()])
    captions = scenes.captions(rng)
    latents, texts = [], []
    while len(texts) < count // ranks.count():
        some = [next(captions) for _ in range(50)]
        pictures = to_tensor(np.stack([scenes.paint(caption, rng, SPREAD) for caption in some]))
        latents.append(model.encode(pictures).latent_dist.mode().contiguous())
        texts += map(str, some)
    every = ranks.gather(torch.cat(latents).contiguous())
    scale = round(1 / every.std().item(), 4)
    model.register_to_config(scaling_factor=scale)
    tokens = ranks.gather(network.tokenize(tokenizer, texts))
    return Encoded((every * scale).half(), tokens, network.tokenize(tokenizer, [""])[0])


class Trainer:
    """A run that can be stopped at any step and taken up again."""

    def __init__(self, data: Encoded, text_encoder: CLIPTextModel, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.seed, self.step = data, seed, 0
        self.cpu_seconds = 0.0
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.model = network.unet().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.alphas = network.scheduler().alphas_cumprod

    def run(self, steps: int, every: int, report: Callable[[Trainer], None]) -> None:
        """Train up to step ``steps``; call ``report`` every ``every`` steps and at the end."""
        losses, started = [], time.monotonic()
        while self.step < steps:
            before = time.process_time()
            losses.append(self._step(float(np.interp(self.step + 1, *RATES))))
            self.cpu_seconds += time.process_time() - before
            if self.step % 50 == 0 and ranks.rank() == 0:
                seconds, loss = time.monotonic() - started, np.mean(losses[-200:])
                print(f"unet {self.step}/{steps}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
            if self.step % every == 0 or self.step == steps:
                report(self)

    def save(self, file: Path) -> None:
        """Write weights, their average and the optimizer's moments, whole or not at all."""
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        state |= {name: torch.tensor(getattr(self, name)) for name in ("step", "cpu_seconds")}
        partial = file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in state.items()}, partial)
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Take up the run where ``save`` left it."""
        state = load_file(file)
        self.step, self.cpu_seconds = int(state["step"]), float(state["cpu_seconds"])
        self.model.load_state_dict(_under(state, "model."))
        self.average.load_state_dict(_under(state, "average."))
        parameters, whole = list(self.model.parameters()), self.optimizer.state_dict()
        for name, moment in _under(state, "optimizer.").items():
            index, key = name.split(".")
            if key != "step":  # the fused optimizer wants the parameter's own memory layout
                moment = torch.empty_like(parameters[int(index)]).copy_(moment)
            whole["state"].setdefault(int(index), {})[key] = moment
        self.optimizer.load_state_dict(whole)

    def _step(self, rate: float) -> float:
        latents, tokens, timesteps, noise = self._batch()
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        velocity = signal * noise - sigma * latents
        states = self.text_encoder(tokens).last_hidden_state
        predicted = self.model(signal * latents + sigma * noise, timesteps, states).sample
        loss = functional.mse_loss(predicted, velocity)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._follow()
        return loss.item()

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The step's own batch, whatever ran before it."""
        count, batch = len(self.data.latents), batch_size(self.step)
        # Every size of batches divides the number of scenes.
        epoch, at = divmod(scenes_before(self.step), count)
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(count)
        rows = torch.from_numpy(order[at : at + batch])
        draw = torch.Generator().manual_seed(self.seed + 1_000_003 * (self.step + 1))
        latents = self.data.latents[rows].float().contiguous(memory_format=torch.channels_last)
        dropped = torch.rand(batch, generator=draw) < EMPTY_CAPTIONS
        tokens = torch.where(dropped[:, None], self.data.empty, self.data.tokens[rows])
        # One timestep from each of as many equal spans: the loss varies less between batches.
        spans = torch.arange(batch) + torch.rand(batch, generator=draw)
        times = np.interp(spans.double().numpy() / batch, *TIMES)
        last = len(self.alphas) - 1
        timesteps = torch.from_numpy(times * len(self.alphas)).long().clamp(max=last)
        noise = torch.randn(latents.shape, generator=draw)
        mine = slice(ranks.rank(), None, ranks.count())
        return latents[mine], tokens[mine], timesteps[mine], noise[mine]

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        averages, current = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, current, 1 - decay)


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def batch_size(step: int) -> int:
    """How many scenes a step sees, over all ranks."""
    return next(size for first, size in reversed(BATCHES.items()) if step >= first)


def scenes_before(step: int) -> int:
    """How many scenes the steps before this one see."""
    ends = [*list(BATCHES)[1:], step]
    spans = zip(BATCHES.items(), ends, strict=True)
    return sum(size * max(0, min(step, end) - first) for (first, size), end in spans)


def step_of(file: Path) -> int:
    """The step at which ``Trainer.save`` wrote a file."""
    with safe_open(file, "pt") as state:
        return int(state.get_tensor("step"))
