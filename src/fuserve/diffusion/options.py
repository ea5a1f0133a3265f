"""What a user may choose about how a diffusion model is held in memory and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fuserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class LoraOption:
    """A LoRA to add: a ``.safetensors`` file, or a folder with one, and how much of it."""

    path: str | Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """Options of one loaded model.

    Attributes:
        executor: "reference" runs in torch.
        device: of the reference executor.
        dtype: of the weights in memory; arithmetic is float32. "auto" is float32.
        memory_bytes: what the model may take, with its process: chooses between float32 and (with
            dtype "auto") float16 weights, and decoding whole and in bands, for pictures of the
            model's own size. None: the fastest, whatever it takes.
        exact_conv: convolve directly, or no less exactly (where an image is enlarged).
        vae: a folder or hub id with another autoencoder, such as "madebyollin/taesd".
        tokenizer: a folder or hub id with CLIP's tokenizer, for single-file checkpoints; None takes
            the folder ``tokenizer`` beside the file, or the one on the hub.
        loras: added at run time, beside the weights.
        num_threads: None takes affinity, cgroup quota and SMT siblings into account.
        num_cached_programs: sizes of each network that are kept ready.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    executor: Literal["native", "reference"] = "native"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "float16"] = "auto"
    memory_bytes: int | None = None
    exact_conv: bool = False
    vae: str | Path | None = None
    tokenizer: str | Path | None = None
    loras: tuple[LoraOption, ...] = ()
    num_threads: int | None = None
    num_cached_programs: int = 8

    def __post_init__(self) -> None:
        if self.executor not in ("native", "reference"):
            raise InvalidRequestError(f"executor={self.executor!r} is not 'native' or 'reference'.")
        if self.dtype not in ("auto", "float32", "float16"):
            raise InvalidRequestError(
                f"dtype={self.dtype!r} is not 'auto', 'float32' or 'float16'."
            )
        if self.memory_bytes is not None and self.executor != "native":
            raise InvalidRequestError("memory_bytes is for the native executor.")
        if self.num_cached_programs < 1:
            raise InvalidRequestError("num_cached_programs must be at least 1.")
