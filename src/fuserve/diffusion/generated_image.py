"""A finished picture, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fuserve.diffusion.image_file import Pixels, save_image
from fuserve.diffusion.image_params import FloatArray, ImageParams


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedImage:
    """One picture.

    Attributes:
        pixels: ``[height, width, 3]``.
        prompt: what it shows.
        params: what was asked.
        seed: the seed that gives this very picture.
        steps: denoising steps of a whole run; an initial image leaves some of them out.
        sampler: the scheduler, as the field's tools call it.
        model: the model argument.
        latents: that were decoded  # [height, width, channels].
    """

    pixels: Pixels
    prompt: str
    params: ImageParams
    seed: int
    steps: int
    sampler: str
    model: str
    latents: FloatArray

    @property
    def width(self) -> int:
        """Pixels of a row."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def parameters(self) -> str:
        """How it was made, in the lines that Stable Diffusion's tools write and read."""
        params = self.params
        facts = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": f"{params.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": Path(self.model).name,
        }
        if params.guidance_rescale:
            facts["CFG rescale"] = f"{params.guidance_rescale:g}"
        if params.step_cache is not None:
            facts["Cache interval"] = params.cache_interval
            facts["Cache branch"] = params.cache_branch
        if params.init_image is not None:
            facts["Denoising strength"] = f"{params.effective_strength:g}"
        lines = [self.prompt]
        if params.negative_prompt:
            lines.append(f"Negative prompt: {params.negative_prompt}")
        lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a file; a PNG has ``parameters`` in it.

        Raises:
            InvalidRequestError: the suffix names no format, or there is no such folder.
            MissingExtraError: Pillow is not installed (extra ``image``).
        """
        save_image(path, self.pixels, self.parameters)
