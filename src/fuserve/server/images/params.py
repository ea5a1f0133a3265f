"""From a request's fields to what the engine takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from PIL import Image

from fuserve.diffusion.image_params import MAX_SIDE, ImageParams
from fuserve.engine.images.model import ServedModel
from fuserve.errors import InvalidRequestError
from fuserve.server.errors import ApiError, invalid
from fuserve.server.images.pictures import has_alpha, mask_pixels, rgb_pixels
from fuserve.server.protocol.image import MAX_PIXELS, EditBody, ImageBody

_FIELDS = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "init_image": "image",
    "A prompt": "prompt",
}
_OWN = frozenset(field.name for field in fields(ImageParams))


def generation_params(body: ImageBody) -> ImageParams:
    """Of pictures from nothing.

    Raises:
        ApiError: naming the field that is wrong.
    """
    width, height = body.width_and_height
    return _params(body, width=width, height=height)


def edit_params(
    body: EditBody, model: ServedModel, image: Image.Image, mask: Image.Image | None
) -> ImageParams:
    """Of pictures from a picture; without a mask its own transparent parts are made anew.

    The picture gets the size that was asked for, or the nearest to its own that the model can do.

    Raises:
        ApiError: naming the field that is wrong.
    """
    if mask is not None and mask.size != image.size:
        raise invalid(
            "mask",
            f"mask has {mask.width} x {mask.height} pixels and image {image.width} x "
            f"{image.height}; they must have the same.",
        )
    width, height = body.width_and_height
    if width is None or height is None:
        multiple = model.size_multiple
        width, height = (max(1, round(side / multiple)) * multiple for side in image.size)
        _check_size("image", width, height)  # a narrow picture grows by what it is rounded up to
    else:
        _check_size("size", width, height)
    if mask is None and has_alpha(image):
        mask = image
    return _params(
        body,
        width=width,
        height=height,
        strength=body.strength,
        init_image=rgb_pixels(image, width, height),
        mask=None if mask is None else mask_pixels(mask, width, height),
    )


def _check_size(param: str, width: int, height: int) -> None:
    """Refuse, before it is allocated, what no model may paint."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise invalid(
            param,
            f"{param} makes a picture of {width} x {height}; at most {MAX_SIDE} pixels a side and "
            f"{MAX_PIXELS} in all are painted.",
        )


def field_error(error: InvalidRequestError) -> ApiError:
    """A 400 that names the field that the message is about."""
    message = str(error)
    name = re.match(r"A prompt|\w*", message)
    own = name.group() if name else ""
    param = _FIELDS.get(own, own if own in _OWN else None)
    return ApiError(400, message, param=param)


def _params(body: ImageBody, **chosen: Any) -> ImageParams:
    given: Mapping[str, Any] = {
        "negative_prompt": body.negative_prompt,
        "steps": body.steps,
        "guidance_scale": body.guidance_scale,
        "num_images": body.n,
        "seed": body.seed,
        "scheduler": body.scheduler,
        "cache_interval": body.cache_interval,
        "cache_branch": body.cache_branch,
        **chosen,
    }
    try:
        return ImageParams(**{name: value for name, value in given.items() if value is not None})
    except InvalidRequestError as error:
        raise field_error(error) from error
