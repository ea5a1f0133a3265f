"""A text-to-image model: encode prompts, denoise, decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from fuserve.checkpoints.find import find_diffusion_model, find_lora, find_tokenizer
from fuserve.diffusion import denoiser as whole
from fuserve.diffusion.autoencoder import Autoencoder
from fuserve.diffusion.backends import make_backend
from fuserve.diffusion.conditions import added_conditions, time_vectors
from fuserve.diffusion.denoiser import TextStates
from fuserve.diffusion.diffusers_folder import read_diffusers_folder, read_vae
from fuserve.diffusion.image_model import Denoiser
from fuserve.diffusion.lora import Branch
from fuserve.diffusion.lora_file import UNET, Modules, read_lora
from fuserve.diffusion.memory_plan import DECODE_BYTES, packing_options, plan_memory
from fuserve.diffusion.network import Backend, Network
from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.diffusion.packed_weights import PackingOptions
from fuserve.diffusion.parts import ModelParts
from fuserve.diffusion.program import Array
from fuserve.diffusion.prompts import PromptEmbeds, PromptEncoder
from fuserve.diffusion.single_file import read_single_file
from fuserve.diffusion.single_file_names import unet_modules
from fuserve.diffusion.step_cache import StepCache
from fuserve.diffusion.stepwise import Tap, tapped
from fuserve.diffusion.text_encoder_program import text_encoder_program
from fuserve.diffusion.unet_program import prompt_program, unet_programs
from fuserve.errors import InvalidRequestError

DEFAULT_OPTIONS = DiffusionOptions()

Denoising = Callable[[PackingOptions], Backend]
MAX_TEXT_STATE_BYTES = 256 << 20
PLANNED_TEXT_STATE_BYTES = 32 << 20
"""Of the keys and values of prompts that are kept, without and with a memory budget: 8 MB each for
SD 1.5, 55 MB for SDXL."""


class DiffusionModel:
    """Text encoders, denoising network and autoencoder of one checkpoint.

    For one thread at a time.

    Args:
        parts: of the checkpoint, checked.
        options: how it is held in memory and run.
        tap: sees, and may change, what the layers of the denoiser read, which is slower then.
        denoising: makes what runs the denoiser, given how its weights are kept, where that is not
            what runs the rest.

    Raises:
        CapacityError: it does not fit into ``options.memory_bytes``.
    """

    def __init__(
        self,
        parts: ModelParts,
        options: DiffusionOptions = DEFAULT_OPTIONS,
        tap: Tap | None = None,
        denoising: Denoising | None = None,
    ) -> None:
        self._parts = parts
        self._has_loras = False
        self._spec = spec = parts.unet.spec
        self.memory_plan = (
            None
            if options.memory_bytes is None
            else plan_memory(parts, options, options.memory_bytes)
        )
        """How it fits into ``options.memory_bytes``."""
        plan = self.memory_plan
        packing = packing_options(options) if plan is None else plan.packing
        backend = make_backend(options, packing)
        count = options.num_cached_programs
        self._prompts = PromptEncoder(
            parts.texts,
            backend,
            penultimate=parts.penultimate,
            pooled=spec.text_time is not None,
        )
        unet_backend = backend if denoising is None else denoising(packing)
        if tap is not None:
            unet_backend = tapped(unet_backend, tap)
        self._unet = Network(parts.unet.weights, unet_backend, count)
        decode_bytes = DECODE_BYTES if plan is None else plan.decode_bytes
        self._autoencoder = Autoencoder(parts.vae, backend, count, decode_bytes)
        self._text_states: OrderedDict[str, TextStates] = OrderedDict()
        self.set_loras(options.loras)

    @classmethod
    def load(
        cls,
        model: str | Path,
        options: DiffusionOptions = DEFAULT_OPTIONS,
        denoising: Denoising | None = None,
    ) -> Self:
        """From a diffusers folder, a ``.safetensors`` file, a hub id, or ``"demo-diffusion"``.

        Raises:
            ModelNotFoundError: there is no such model.
            CheckpointError: it is damaged, incomplete, or in a form that is refused.
            UnsupportedModelError: a field of its configs is not supported; it is named.
            MissingExtraError: the demo model or torch is asked for and not installed.
            CapacityError: it does not fit into ``options.memory_bytes``.
        """
        return cls(read_parts(model, options), options, denoising=denoising)

    def set_loras(self, loras: Sequence[LoraOption]) -> None:
        """Run with these LoRAs from now on, instead of those there are; none takes all away.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: a file is damaged, or its LoRA is for another model.
            UnsupportedModelError: it is no plain LoRA.
        """
        if not loras and not self._has_loras:
            return
        modules = self._modules()
        branches: dict[str, dict[str, list[Branch]]] = {name: {} for name in modules}
        for lora in loras:
            read = read_lora(find_lora(lora.path), lora.scale, modules)
            for name, found in read.items():
                for path, one in found.items():
                    branches[name].setdefault(path, []).extend(one)
        self._has_loras = bool(loras)
        self._unet.set_branches(branches[UNET])
        self._prompts.set_branches([branches[name] for name in list(modules)[1:]])
        self._text_states.clear()

    def _modules(self) -> dict[str, Modules]:
        """What can have a LoRA, by network: first the denoiser, then the text encoders."""
        parts, spec = self._parts, self._spec
        old = {old: new for new, old in unet_modules(spec).items()}
        found = {UNET: Modules(parts.unet.weights, unet_programs(spec), old)}
        for part, name in zip(parts.texts, ("text_encoder", "text_encoder_2"), strict=False):
            program = text_encoder_program(part.spec, 1, 1)
            found[name] = Modules(part.weights, (program,), {"": "text_model."})
        return found

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The checkpoint's ``scheduler_config.json``."""
        return self._parts.scheduler_config

    @property
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction`` or ``sample``."""
        return str(self._parts.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def in_channels(self) -> int:
        """Channels that the network reads: more than the latents' for an inpainting model."""
        return self._spec.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of a prediction."""
        return self._spec.out_channels

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        vae = self._parts.vae
        return self._spec.out_channels if vae is None else vae.spec.latent_channels

    @property
    def scale_factor(self) -> int:
        """Pixels of a side over latents."""
        return self._autoencoder.scale_factor

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.scale_factor * self._spec.size_multiple

    @property
    def sample_size(self) -> int:
        """Side of the latents that the model was trained on."""
        return self._spec.sample_size

    @property
    def scaling_factor(self) -> float:
        """What encoded images are multiplied by to have unit variance."""
        return self._autoencoder.scaling_factor

    @property
    def embeds_guidance(self) -> bool:
        """The network is told the guidance scale (LCM); it needs no negative prompt then."""
        return self._spec.guidance_channels is not None

    @property
    def num_cache_branches(self) -> int:
        """Skip connections at which step caching can take over: ``cache_branch`` is below this."""
        return self._spec.num_skips

    @property
    def prompt_queries(self) -> int:
        """Prompts that were to be encoded so far."""
        return self._prompts.num_queries

    @property
    def prompt_hits(self) -> int:
        """How many of them had been kept."""
        return self._prompts.num_hits

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt that the text encoder reads, those of its begin and end included."""
        return self._prompts.count_tokens(prompt)

    def encode_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> PromptEmbeds:
        """Encode prompts, or take them from those that were encoded lately.

        Args:
            prompts: at least one; what is longer than the text encoder reads is cut off.
            negative: an empty prompt means none; SDXL's is zeros.

        Raises:
            InvalidRequestError: there is no prompt, or one is no text.
        """
        embeds = self._prompts.encode(prompts)
        if not (negative and self._parts.zero_empty_negative and "" in prompts):
            return embeds
        kept = np.array([bool(prompt) for prompt in prompts], np.float32)
        keys = tuple(prompt or _ZEROS for prompt in prompts)
        pooled = None if embeds.pooled is None else embeds.pooled * kept[:, None]
        return PromptEmbeds(embeds.hidden * kept[:, None, None], pooled, keys)

    def denoiser(
        self,
        positive: PromptEmbeds,
        negative: PromptEmbeds | None,
        timesteps: Array,
        height: int,
        width: int,
        *,
        guidance_scale: float = 1.0,
        step_cache: StepCache | None = None,
    ) -> Denoiser:
        """Bind prompts, timesteps and a size in pixels: what depends on these is computed now.

        ``guidance_scale`` is for networks that are told it (``embeds_guidance``). The denoiser of a
        ``step_cache`` remembers its last full step: it is for one run.

        Raises:
            InvalidRequestError: the size is no multiple of ``size_multiple``, or there are not as
                many negative prompts as positive ones.
            CapacityError: pictures of this size do not fit into ``options.memory_bytes``.
        """
        multiple = self.size_multiple
        for name, side in (("height", height), ("width", width)):
            if side < multiple or side % multiple:
                near = max(1, round(side / multiple)) * multiple
                raise InvalidRequestError(
                    f"{name}={side} must be a multiple of {multiple} for this model, as {near}."
                )
        if negative is not None and len(negative) != len(positive):
            raise InvalidRequestError(
                f"There are {len(negative)} negative prompts for {len(positive)} prompts."
            )
        factor = self.scale_factor
        if self.memory_plan is not None:
            self.memory_plan.check_size(height // factor, width // factor)
        added = None
        if self._spec.text_time is not None:
            added = added_conditions(self._spec.text_time, positive, negative, height, width)
        times = time_vectors(self._spec, self._unet, timesteps, added, guidance_scale)
        return whole.Denoiser(
            self._spec,
            self._unet,
            self._states(positive),
            None if negative is None else self._states(negative),
            times,
            height // factor,
            width // factor,
            step_cache,
        )

    def decode(self, latents: Array) -> Array:
        """Latents, as they were denoised, to images with values from 0 to 1.

        ``[images, height, width, latent_channels]`` to ``[images, height, width, 3]``.
        """
        return self._autoencoder.decode(latents)

    def release(self) -> None:
        """Give back the working memory, which is that of the largest picture so far.

        The next picture takes what it needs.
        """
        self._prompts.release()
        self._unet.release()
        self._autoencoder.release()

    def close(self) -> None:
        """End what belongs to the model beside this process; it cannot be used any more."""

    def encode(self, images: Array) -> Array:
        """Images with values from 0 to 1 to what their latents are drawn from.

        Returns:
            Means and log-variances of latents before ``scaling_factor``, side by side
            # [images, height, width, 2 * latent_channels].

        Raises:
            InvalidRequestError: a side is no multiple of ``scale_factor``.
        """
        return self._autoencoder.encode(images)

    def _states(self, embeds: PromptEmbeds) -> list[TextStates]:
        """Keys and values of each prompt, of which those used lately are kept."""
        states, tokens = [], embeds.hidden.shape[1]
        for key, hidden in zip(embeds.keys, embeds.hidden, strict=True):
            found = self._text_states.pop(key, None)
            if found is None:
                found = self._unet.run(
                    ("prompt", tokens),
                    lambda: prompt_program(self._spec, 1, tokens),
                    {"text": hidden[None, None]},
                )
            self._text_states[key] = found
            states.append(found)
        each = sum(array.nbytes for array in states[0].values())
        most = MAX_TEXT_STATE_BYTES if self.memory_plan is None else PLANNED_TEXT_STATE_BYTES
        kept = max(2, most // max(each, 1))
        while len(self._text_states) > kept:
            del self._text_states[next(key for key in self._text_states if key not in _ALWAYS_KEPT)]
        return states


def read_parts(model: str | Path, options: DiffusionOptions) -> ModelParts:
    """A model's parts, opened and checked; no weight is read yet. See ``DiffusionModel.load``."""
    path = find_diffusion_model(model)
    if path.is_file():
        parts = read_single_file(path, _tokenizer_for(path, options))
    else:
        parts = read_diffusers_folder(path)
    if options.vae is not None:
        parts = parts.with_vae(read_vae(options.vae))
    parts.check()
    return parts


def _tokenizer_for(file: Path, options: DiffusionOptions) -> Path:
    """Where the tokenizer of a single-file checkpoint is."""
    if options.tokenizer is not None:
        return find_tokenizer(options.tokenizer)
    beside = file.parent / "tokenizer"
    return beside if beside.is_dir() else find_tokenizer(_CLIP_L)


_CLIP_L = "openai/clip-vit-large-patch14"
_ZEROS = "\0"  # the key of a row of zeros, which no prompt in use is
_ALWAYS_KEPT = ("", _ZEROS)
