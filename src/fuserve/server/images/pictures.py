"""Pictures as files: PNG out, and whatever clients send in."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fuserve.diffusion.image_file import to_pixels
from fuserve.server.errors import invalid
from fuserve.server.protocol.image import MAX_PIXELS

FloatArray = NDArray[np.float32]

_FORMATS = ("PNG", "JPEG", "WEBP")
_HALF = 128


def png_base64(image: FloatArray) -> str:
    """A picture ``[height, width, 3]`` from 0 to 1 as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def read_picture(data: bytes, param: str) -> Image.Image:
    """A picture that a client sent, decoded.

    Args:
        data: a PNG, JPEG or WebP file.
        param: the field it came in.

    Raises:
        ApiError: it is none of them, damaged, or too large.
    """
    too_large = invalid(param, f"{param} has more than {MAX_PIXELS} pixels.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:  # before anything is unpacked
            raise too_large
        image.load()
    except Image.DecompressionBombError as error:  # far more, which Pillow refuses itself
        raise too_large from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        message = f"{param} is not a readable PNG, JPEG or WebP picture."
        raise invalid(param, message) from error
    return image


def rgb_pixels(image: Image.Image, width: int, height: int) -> FloatArray:
    """A picture in another size: ``[height, width, 3]``, from 0 to 1."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / np.float32(255)


def mask_pixels(image: Image.Image, width: int, height: int) -> FloatArray:
    """What is to be made anew, ``[height, width]`` of 0 and 1.

    OpenAI's masks say it with full transparency. One without an alpha channel says it in white.
    """
    if has_alpha(image):
        alpha = image.convert("RGBA").getchannel("A").resize((width, height))
        chosen = np.asarray(alpha) < _HALF
    else:
        chosen = np.asarray(image.convert("L").resize((width, height))) >= _HALF
    return chosen.astype(np.float32)


def has_alpha(image: Image.Image) -> bool:
    """Parts of it may be transparent."""
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
