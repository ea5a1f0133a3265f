"""The denoising network as a program, and the small programs that run before the loop.

``unet_program`` is one evaluation. What depends on the prompt alone, keys and values of every
cross-attention, comes from ``prompt_program``; what depends on the schedule alone, the vectors that
the residual blocks add, from ``time_program``, for all timesteps in one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice

import numpy as np

from fuserve.diffusion.program import Array, Program, Slice, Value
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm, layer_norm
from fuserve.diffusion.unet_spec import BlockSpec, UNetSpec

TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a transformer, whatever norm_eps is
LAYER_NORM_EPS = 1e-5


def unet_program(
    spec: UNetSpec,
    images: int,
    prompts: int,
    height: int,
    width: int,
    *,
    tokens: int,
    time_rows: int = 1,
    cache_branch: int | None = None,
    is_shallow: bool = False,
) -> Program:
    """One evaluation: ``latents`` ``[images, height, width, in_channels]`` to ``prediction``.

    ``prompts`` rows of text are ``images``, or twice as many: [negative, positive] of each image.
    All that comes before the first cross-attention is then computed once for both.

    Inputs beside ``latents``: ``time`` ``[time_rows, 1, 1, all]``, and for each transformer layer
    ``text.PATH`` ``[prompts, 1, tokens, 2 * channels]``, its keys and values.

    With ``cache_branch``, the number of a skip connection counted from the latents, there is a
    second output ``feature``: what is joined with that skip, ``[prompts, height, width, channels]``
    at its depth. A shallow program has ``feature`` as an input instead of all the blocks that lead
    to it (DeepCache, arXiv 2312.00858); the text of those is an input still, and not read.
    """
    build = ProgramBuilder()
    latents = build.input("latents", images, height, width, spec.in_channels)
    total = sum(channels for _, channels in spec.resnets())
    time = build.input("time", time_rows, 1, 1, total)
    text = {
        path: build.input(f"text.{path}", prompts, 1, tokens, 2 * channels)
        for path, channels in spec.transformer_layers()
    }
    network = _UNetBuilder(spec, build, time, text)
    if cache_branch is not None and is_shallow:
        prediction = network.shallow_prediction(latents, prompts, cache_branch)
    else:
        prediction, features = network.prediction(latents)
        if cache_branch is not None:
            build.output("feature", features[cache_branch])
    build.output("prediction", prediction)
    return build.finish()


def unet_programs(spec: UNetSpec) -> tuple[Program, ...]:
    """Programs of the least size that name all tensors of the network."""
    side = spec.size_multiple
    return (
        unet_program(spec, 1, 1, side, side, tokens=1),
        prompt_program(spec, 1, 1),
        time_program(spec, 1),
    )


def prompt_program(spec: UNetSpec, prompts: int, tokens: int) -> Program:
    """Keys and values of all cross-attentions from the text's hidden states, input ``text``."""
    build = ProgramBuilder()
    text = build.input("text", prompts, 1, tokens, spec.text_channels)
    for path, channels in spec.transformer_layers():
        stack = (f"{path}.attn2.to_k", f"{path}.attn2.to_v")
        build.output(
            f"text.{path}", build.linear(stack, text, 2 * channels, bias=False, precise=True)
        )
    return build.finish()


def time_program(spec: UNetSpec, rows: int) -> Program:
    """What every residual block adds, side by side in the output ``time``.

    Inputs: ``time`` (``sinusoids`` of timesteps), and where the model has them ``guidance``
    (``guidance_embedding``) and ``added`` (pooled text and the sinusoids of the sizes).
    """
    build = ProgramBuilder()
    linear = partial(build.linear, precise=True)
    width = spec.time_embedding_channels
    time = build.input("time", rows, 1, 1, spec.time_channels)
    if spec.guidance_channels is not None:
        guidance = build.input("guidance", rows, 1, 1, spec.guidance_channels)
        time = linear(
            "time_embedding.cond_proj", guidance, spec.time_channels, bias=False, residual=time
        )
    added = None
    if spec.text_time is not None:
        added = build.input("added", rows, 1, 1, spec.text_time.in_channels)
        added = linear("add_embedding.linear_1", added, width, activation="silu")
        added = linear("add_embedding.linear_2", added, width)
    time = linear("time_embedding.linear_1", time, width, activation="silu")
    # The embedding is used through a SiLU only.
    time = linear("time_embedding.linear_2", time, width, residual=added, activation="silu")
    stack = tuple(f"{path}.time_emb_proj" for path, _ in spec.resnets())
    total = sum(channels for _, channels in spec.resnets())
    build.output("time", linear(stack, time, total))
    return build.finish()


def sinusoids(
    positions: Array, channels: int, *, sin_first: bool = False, freq_shift: float = 0.0
) -> Array:
    """Sinusoidal embedding of timesteps or sizes  # [len(positions), channels]."""
    half = channels // 2
    exponents = -math.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = positions.astype(np.float32)[:, None] * np.exp(exponents)[None]  # [positions, half]
    parts = (np.sin(angles), np.cos(angles))
    embedding = np.concatenate(parts if sin_first else parts[::-1], axis=1)
    return np.pad(embedding, ((0, 0), (0, channels % 2))).astype(np.float32)


def guidance_embedding(guidance_scale: float, channels: int) -> Array:
    """What an LCM is told of the guidance scale (arXiv 2310.04378)  # [1, channels]."""
    scale = np.array([(guidance_scale - 1.0) * 1000.0], np.float32)
    return sinusoids(scale, channels, sin_first=True, freq_shift=1.0)


class _UNetBuilder:
    """Writes the network's blocks, each under its path in the checkpoint."""

    def __init__(
        self, spec: UNetSpec, build: ProgramBuilder, time: Value, text: dict[str, Value]
    ) -> None:
        self._spec, self._build, self._text = spec, build, text
        self._time: dict[str, Slice] = {}
        first = 0
        for path, channels in spec.resnets():
            self._time[path] = Slice(time, first)
            first += channels

    def prediction(self, latents: Value) -> tuple[Value, list[Value]]:
        """The output, and for each skip connection what is joined with it on the way up."""
        spec, skips = self._spec, list(self._skips(latents))
        image = self._step(spec.middle, 0, (skips[-1],))
        image = self._resnet(f"{spec.middle.path}.resnets.1", (image,), spec.middle.channels)
        return self._up(image, skips)

    def shallow_prediction(self, latents: Value, prompts: int, branch: int) -> Value:
        """The output from an input ``feature``, which is joined with the skip of ``branch``."""
        skips = list(islice(self._skips(latents), branch + 1))
        size = skips[-1].height, skips[-1].width
        channels = self._spec.feature_channels(branch)
        feature = self._build.input("feature", prompts, *size, channels)
        return self._up(feature, skips)[0]

    def _skips(self, latents: Value) -> Iterator[Value]:
        """The way down; no further than they are taken."""
        spec, build = self._spec, self._build
        image = build.conv("conv_in", latents, spec.down[0].channels)
        yield image
        for block in spec.down:
            for index in range(block.resnets):
                image = self._step(block, index, (image,))
                yield image
            if block.resampled:
                path = f"{block.path}.downsamplers.0.conv"
                image = build.conv(path, image, block.channels, stride=2)
                yield image

    def _up(self, image: Value, skips: list[Value]) -> tuple[Value, list[Value]]:
        """The way up from where ``image`` is joined with the last of the skips."""
        spec, build = self._spec, self._build
        features: list[Value] = []  # from the last skip to the first
        for block, index in list(spec.up_steps())[-len(skips) :]:
            features.append(image)
            image = self._step(block, index, (image, skips.pop()))
            if block.resampled and index == block.resnets - 1:
                path = f"{block.path}.upsamplers.0.conv"
                image = build.conv(path, image, block.channels, upsample=True)
        norm = group_norm("conv_norm_out", spec.groups, spec.eps, silu=True)
        return build.conv("conv_out", image, spec.out_channels, norm=norm), features[::-1]

    def _step(self, block: BlockSpec, index: int, sources: tuple[Value, ...]) -> Value:
        """A residual block, and the transformer behind it where there is one."""
        image = self._resnet(f"{block.path}.resnets.{index}", sources, block.channels)
        if block.transformer_layers:
            image = self._transformer(f"{block.path}.attentions.{index}", image, block)
        return image

    def _resnet(self, path: str, sources: tuple[Value, ...], channels: int) -> Value:
        spec, build = self._spec, self._build
        hidden = build.conv(
            f"{path}.conv1",
            sources,
            channels,
            norm=group_norm(f"{path}.norm1", spec.groups, spec.eps, silu=True),
            channel_add=self._time[path],
        )
        if len(sources) == 1 and sources[0].channels == channels:
            residual = sources[0]
        else:
            residual = build.conv(f"{path}.conv_shortcut", sources, channels, size=1)
        norm = group_norm(f"{path}.norm2", spec.groups, spec.eps, silu=True)
        return build.conv(f"{path}.conv2", hidden, channels, norm=norm, residual=residual)

    def _transformer(self, path: str, image: Value, block: BlockSpec) -> Value:
        spec, build, channels = self._spec, self._build, block.channels
        norm = group_norm(f"{path}.norm", spec.groups, TRANSFORMER_NORM_EPS)
        hidden = build.conv(f"{path}.proj_in", image, channels, size=1, norm=norm)
        for layer in range(block.transformer_layers):
            hidden = self._transformer_layer(
                f"{path}.transformer_blocks.{layer}", hidden, block.heads
            )
        return build.conv(f"{path}.proj_out", hidden, channels, size=1, residual=image)

    def _transformer_layer(self, path: str, hidden: Value, heads: int) -> Value:
        build, channels = self._build, hidden.channels
        head_dim = channels // heads
        attention = f"{path}.attn1"
        stack = (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
        norm = layer_norm(f"{path}.norm1", LAYER_NORM_EPS)
        qkv = build.linear(stack, hidden, 3 * channels, bias=False, norm=norm)
        query, key, value = Slice(qkv), Slice(qkv, channels), Slice(qkv, 2 * channels)
        context = build.attention(attention, query, key, value, heads, head_dim)
        hidden = build.linear(f"{attention}.to_out.0", context, channels, residual=hidden)

        attention, text = f"{path}.attn2", self._text[path]
        norm = layer_norm(f"{path}.norm2", LAYER_NORM_EPS)
        asked = build.linear(f"{attention}.to_q", hidden, channels, bias=False, norm=norm)
        query, key, value = Slice(asked), Slice(text), Slice(text, channels)
        context = build.attention(attention, query, key, value, heads, head_dim)
        hidden = build.linear(f"{attention}.to_out.0", context, channels, residual=hidden)

        norm = layer_norm(f"{path}.norm3", LAYER_NORM_EPS)
        wide = build.linear(
            f"{path}.ff.net.0.proj", hidden, 4 * channels, norm=norm, activation="geglu"
        )
        return build.linear(f"{path}.ff.net.2", wide, channels, residual=hidden)
