"""A CLIP text encoder as a program."""

from __future__ import annotations

from fuserve.diffusion.program import Program, Slice
from fuserve.diffusion.program_builder import ProgramBuilder, layer_norm
from fuserve.diffusion.text_encoder_spec import TextEncoderSpec


def text_encoder_program(
    spec: TextEncoderSpec, prompts: int, tokens: int, *, skip: int = 0
) -> Program:
    """``embeddings`` ``[prompts, 1, tokens, channels]`` to hidden states.

    Outputs: ``last``, through the final norm; with ``skip`` also ``hidden``, what layer
    ``layers - skip`` gave, without a norm.
    """
    build = ProgramBuilder()
    channels = spec.channels
    hidden = build.input("embeddings", prompts, 1, tokens, channels)
    for index in range(spec.layers):
        if spec.layers - index == skip:
            build.output("hidden", hidden)
        path = f"text_model.encoder.layers.{index}"
        attention = f"{path}.self_attn"
        stack = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        norm = layer_norm(f"{path}.layer_norm1", spec.eps)
        qkv = build.linear(stack, hidden, 3 * channels, norm=norm)
        context = build.attention(
            attention,
            Slice(qkv),
            Slice(qkv, channels),
            Slice(qkv, 2 * channels),
            spec.heads,
            channels // spec.heads,
            causal=True,
        )
        hidden = build.linear(f"{attention}.out_proj", context, channels, residual=hidden)
        norm = layer_norm(f"{path}.layer_norm2", spec.eps)
        wide = build.linear(
            f"{path}.mlp.fc1",
            hidden,
            spec.feed_forward_channels,
            norm=norm,
            activation=spec.activation,
        )
        hidden = build.linear(f"{path}.mlp.fc2", wide, channels, residual=hidden)
    path = "text_model.final_layer_norm"
    build.output("last", build.normalize(path, hidden, layer_norm(path, spec.eps)))
    return build.finish()
