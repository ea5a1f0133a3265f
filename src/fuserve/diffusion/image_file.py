"""Pictures in files, read and written by Pillow (extra ``image``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fuserve.errors import InvalidRequestError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = NDArray[np.float32]
Pixels = NDArray[np.uint8]

DEFAULT_MULTIPLE = 64
"""Sides that every Stable Diffusion takes."""


def load_image(
    path: str | Path,
    width: int | None = None,
    height: int | None = None,
    multiple: int = DEFAULT_MULTIPLE,
) -> FloatArray:
    """Read a picture to start from, ``[height, width, 3]``, values from 0 to 1.

    Args:
        path: a file of any format that Pillow reads.
        width: scale to it; None takes the file's, rounded down to a multiple.
        height: likewise.
        multiple: what sides are rounded down to.

    Raises:
        InvalidRequestError: there is no such file, or it is no picture.
        MissingExtraError: Pillow is not installed.
    """
    picture = _open(path).convert("RGB")
    size = _side(width, picture.width, multiple), _side(height, picture.height, multiple)
    return _scaled(picture, size)


def load_mask(path: str | Path, width: int, height: int) -> FloatArray:
    """Read a mask, ``[height, width]``: 1 where it is white, 0 where it is black.

    Raises:
        InvalidRequestError: there is no such file, or it is no picture.
        MissingExtraError: Pillow is not installed.
    """
    return _scaled(_open(path).convert("L"), (width, height))


def check_writable(path: str | Path) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        InvalidRequestError: no format has this suffix, or there is no such folder.
        MissingExtraError: Pillow is not installed.
    """
    image = _pillow()
    path = Path(path)
    if path.suffix.lower() not in image.registered_extensions():
        raise InvalidRequestError(f"{path}: the suffix names no image format; take .png.")
    if not path.parent.is_dir():
        raise InvalidRequestError(f"{path.parent} is no folder; make it first.")


def save_image(path: str | Path, pixels: Pixels, parameters: str) -> None:
    """Write a picture; PNG files tell how it was made.

    Args:
        path: the suffix chooses the format.
        pixels: ``[height, width, 3]``.
        parameters: goes into the text chunk ``parameters``, where the field's tools look for it.

    Raises:
        InvalidRequestError: as ``check_writable``.
        MissingExtraError: Pillow is not installed.
    """
    check_writable(path)
    keywords: dict[str, Any] = {}
    if Path(path).suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        keywords["pnginfo"] = info = PngInfo()
        info.add_text("parameters", parameters)
    _pillow().fromarray(pixels).save(path, **keywords)


def to_pixels(image: FloatArray) -> Pixels:
    """Values from 0 to 1 to bytes, as diffusers rounds them."""
    pixels: Pixels = np.rint(image * np.float32(255)).astype(np.uint8)
    return pixels


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "image", "Reading and writing pictures") from None
    return Image


def _open(path: str | Path) -> Image:
    pillow = _pillow()
    try:
        picture: Image = pillow.open(path)
        picture.load()
    except FileNotFoundError:
        raise InvalidRequestError(f"{path}: there is no such file.") from None
    except (OSError, pillow.DecompressionBombError) as error:
        raise InvalidRequestError(f"{path} cannot be read as a picture: {error}.") from None
    return picture


def _side(wanted: int | None, own: int, multiple: int) -> int:
    return wanted or max(own - own % multiple, multiple)


def _scaled(picture: Image, size: tuple[int, int]) -> FloatArray:
    if picture.size != size:
        picture = picture.resize(size, _pillow().Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / np.float32(255)
