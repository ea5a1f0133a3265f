"""The prompts that a diffusion model is calibrated on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fuserve.errors import InvalidRequestError


def read_prompts(path: Path | None, count: int) -> list[str]:
    """The first prompts of a file, one in each line; None is the packaged list.

    Raises:
        InvalidRequestError: the file cannot be read, or holds no prompt.
    """
    file = path or Path(str(files("fuserve.calibration") / "data" / "captions.txt"))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequestError(f"{file}: holds no prompt; write one in each line.")
    return prompts[:count]
