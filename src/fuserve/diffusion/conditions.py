"""What the denoising network is told beside latents and text: times, sizes, guidance scale."""

from __future__ import annotations

import numpy as np

from fuserve.diffusion.network import Network
from fuserve.diffusion.program import Array
from fuserve.diffusion.prompts import PromptEmbeds
from fuserve.diffusion.unet_program import guidance_embedding, sinusoids, time_program
from fuserve.diffusion.unet_spec import TextTimeSpec, UNetSpec


def time_vectors(
    spec: UNetSpec,
    network: Network,
    timesteps: Array,
    added: Array | None,
    guidance_scale: float,
) -> Array:
    """What the residual blocks add at each step, computed for all steps at once.

    Args:
        spec: the network.
        network: runs its programs.
        timesteps: of the schedule; they may be fractions.  # [steps]
        added: ``added_conditions``, for a network that has them  # [rows of text, channels].
        guidance_scale: for a network that is told it.

    Returns:
        ``[steps, rows, channels]``: one row for all rows of text, or one for each.
    """
    steps, rows = len(timesteps), 1 if added is None else len(added)
    time = sinusoids(
        np.asarray(timesteps),
        spec.time_channels,
        sin_first=spec.sin_first,
        freq_shift=spec.freq_shift,
    )
    inputs = {"time": np.repeat(time, rows, axis=0)}
    if added is not None:
        inputs["added"] = np.tile(added, (steps, 1))
    count = steps * rows
    if spec.guidance_channels is not None:
        guidance = guidance_embedding(guidance_scale, spec.guidance_channels)
        inputs["guidance"] = np.repeat(guidance, count, axis=0)
    inputs = {name: array.reshape(count, 1, 1, -1) for name, array in inputs.items()}
    times = network.run(("time", count), lambda: time_program(spec, count), inputs)["time"]
    return times.reshape(steps, rows, -1)


def added_conditions(
    text_time: TextTimeSpec,
    positive: PromptEmbeds,
    negative: PromptEmbeds | None,
    height: int,
    width: int,
) -> Array:
    """Pooled text and sizes in pixels: original, crop corner, target (arXiv 2307.01952, 2.2).

    Returns:
        ``[rows of text, channels]``, rows being [negative, positive] of each prompt.
    """
    assert positive.pooled is not None
    pooled = positive.pooled[:, None]  # [prompts, 1, channels]
    if negative is not None:
        assert negative.pooled is not None
        pooled = np.stack([negative.pooled, positive.pooled], axis=1)
    pooled = pooled.reshape(-1, pooled.shape[-1])
    sizes = np.array([height, width, 0, 0, height, width], np.float32)
    embedded = sinusoids(sizes, text_time.time_dim).reshape(1, -1)
    return np.concatenate([pooled, np.repeat(embedded, len(pooled), axis=0)], axis=1)
