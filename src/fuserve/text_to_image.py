"""TextToImage: a diffusion model in this process, for scripts and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fuserve.diffusion.generated_image import GeneratedImage
from fuserve.diffusion.image_file import to_pixels
from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.model import DiffusionModel
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.pipeline import ImageTask, Stage, default_steps, seeds_of
from fuserve.diffusion.schedulers import sampler_name
from fuserve.errors import InvalidRequestError
from fuserve.parallel.images.model import load_image_model
from fuserve.parallel.images.options import ImageParallelOptions


@dataclass(frozen=True, slots=True)
class ImageProgress:
    """Where a call of ``generate`` is.

    Attributes:
        image: index of the picture in the result.
        num_images: pictures in all.
        stage: what was done last leads here: "denoise", "decode" or "done".
        steps_done: denoising steps of this picture.
        num_steps: likewise, in all.
    """

    image: int
    num_images: int
    stage: Stage
    steps_done: int
    num_steps: int
    _task: ImageTask
    _turn: threading.Lock

    def preview(self) -> NDArray[np.uint8] | None:
        """What the model takes the picture to be by now, ``[height, width, 3]``.

        Costs a decode, for which it waits its turn; a tiny autoencoder makes that cheap. None
        before the first step and at the end.
        """
        with self._turn:
            preview = self._task.preview()
        return None if preview is None else to_pixels(preview[0])


class TextToImage:
    """A loaded diffusion model. Use it in a ``with`` block, or ``close`` it.

    Several threads may use one: their pictures take turns, step by step.

    Args:
        model: a folder as diffusers writes it, a single ``.safetensors`` file, or a hub id.
        dtype: of the weights in memory; "float16" halves them. "auto" is float32.
        memory_bytes: what the model may take, with its process; it is held and run so that it
            fits. None: as is fastest.
        vae: a folder or hub id of another autoencoder, such as the fast ``madebyollin/taesd``.
        tokenizer: a folder or hub id with CLIP's tokenizer, for a single file; None takes the
            folder ``tokenizer`` beside it.
        loras: files to add at run time, each with its scale, as ``"style.safetensors:0.8"`` or
            ``LoraOption``.
        exact_conv: convolve directly, or no less exactly (where an image is enlarged): slower, a
            little more exact than Winograd's transforms.
        num_threads: of each process; None shares out the usable cores.
        cfg_parallel: 2 computes the two halves of guidance in processes of their own.
        patch_parallel: processes that make a band of each picture each. Both multiply.
        step_timeout_s: a denoising step that takes longer has a process that hangs.
        join_timeout_s: a process that says nothing for so long while it starts has failed.
        executor: "native", or "reference" (extra ``torch``).
        device: of the reference executor.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError: on loading.
        RankFailedError: a process does not start.
        CapacityError: ``memory_bytes`` are too few; it says what would do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Literal["auto", "float32", "float16"] = "auto",
        memory_bytes: int | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        loras: Sequence[str | LoraOption] = (),
        exact_conv: bool = False,
        num_threads: int | None = None,
        cfg_parallel: int = 1,
        patch_parallel: int = 1,
        step_timeout_s: float = 600.0,
        join_timeout_s: float = 60.0,
        executor: Literal["native", "reference"] = "native",
        device: str = "cpu",
    ) -> None:
        options = DiffusionOptions(
            executor=executor,
            device=device,
            dtype=dtype,
            memory_bytes=memory_bytes,
            exact_conv=exact_conv,
            vae=vae,
            tokenizer=tokenizer,
            loras=tuple(as_lora(lora) for lora in loras),
            num_threads=num_threads,
        )
        parallel = ImageParallelOptions(
            cfg_parallel, patch_parallel, step_timeout_s, join_timeout_s
        )
        self._name = str(model)
        self._loaded: DiffusionModel | None = load_image_model(model, options, parallel)
        self._turn = threading.Lock()

    def __enter__(self) -> TextToImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this."""
        return self._model.size_multiple

    def generate(
        self,
        prompts: str | Sequence[str],
        params: ImageParams | Sequence[ImageParams] | None = None,
        *,
        progress: Callable[[ImageProgress], None] | None = None,
    ) -> list[GeneratedImage]:
        """Paint ``num_images`` pictures of each prompt.

        Args:
            prompts: a text, or several.
            params: for all prompts, or one for each.
            progress: called after each step. What it raises ends the call.

        Returns:
            The pictures of the first prompt, then those of the second, and so on.

        Raises:
            InvalidRequestError: a prompt or a parameter is refused; nothing is painted then.
            RankFailedError: one of several processes has died or hangs. The next call starts them
                again.
        """
        model = self._model
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = _each(params, len(texts))
        jobs = [
            (text, chosen, seed, ImageTask(model, [text], [seed], chosen))
            for text, chosen in zip(texts, each, strict=True)
            for seed in seeds_of(chosen)
        ]
        return [self._paint(i, len(jobs), *job, progress=progress) for i, job in enumerate(jobs)]

    def close(self) -> None:
        """Free the model's memory, and end its processes. May be called twice."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()

    @property
    def memory(self) -> str | None:
        """How the model fits into ``memory_bytes``, the sum in a line; None without a budget."""
        plan = self._model.memory_plan
        return None if plan is None else plan.describe()

    @property
    def _model(self) -> DiffusionModel:
        if self._loaded is None:
            raise InvalidRequestError("This TextToImage is closed.")
        return self._loaded

    def _paint(
        self,
        index: int,
        num_images: int,
        prompt: str,
        params: ImageParams,
        seed: int,
        task: ImageTask,
        *,
        progress: Callable[[ImageProgress], None] | None,
    ) -> GeneratedImage:
        model = self._model
        latents = None
        while task.stage != "done":
            if task.stage == "decode":
                latents = task.latents
            with self._turn:
                task.step()
            if progress is not None:
                progress(
                    ImageProgress(
                        index,
                        num_images,
                        task.stage,
                        task.steps_done,
                        task.num_steps,
                        task,
                        self._turn,
                    )
                )
        assert latents is not None
        return GeneratedImage(
            to_pixels(task.images[0]),
            prompt,
            params,
            seed,
            default_steps(model, params),
            sampler_name(model.scheduler_config, params.scheduler),
            self._name,
            latents[0],
        )


def _each(params: ImageParams | Sequence[ImageParams] | None, count: int) -> list[ImageParams]:
    if params is None:
        return [ImageParams()] * count
    if isinstance(params, ImageParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} ImageParams for {count} prompts.")
    return list(params)


def as_lora(given: str | LoraOption) -> LoraOption:
    """``PATH`` or ``PATH:scale``."""
    if isinstance(given, LoraOption):
        return given
    path, colon, scale = given.rpartition(":")
    try:
        return LoraOption(path, float(scale)) if colon else LoraOption(given)
    except ValueError:  # a path with a colon in it
        return LoraOption(given)
