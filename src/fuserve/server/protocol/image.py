"""The bodies of ``/v1/images/generations`` and ``/v1/images/edits``: OpenAI's fields, then ours."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from fuserve.diffusion.prompts import MAX_PROMPT_CHARACTERS
from fuserve.server.protocol.sampling import RequestBody

MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 100
MAX_STEPS = 1000
MAX_PIXELS = 4096 * 4096


class ImageBody(RequestBody):
    """What both endpoints take.

    ``quality``, ``style``, ``moderation``, ``input_fidelity`` and ``output_compression`` are
    OpenAI's and mean nothing to a diffusion model: ``steps`` decides the quality.
    """

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    response_format: str | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIAL_IMAGES)
    quality: str | None = None
    moderation: str | None = None
    output_compression: int | None = None

    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARACTERS)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    scheduler: str | None = None
    cache_interval: int | None = Field(None, ge=1, le=MAX_STEPS)
    cache_branch: int | None = Field(None, ge=0)

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, value: str | None) -> str | None:
        if value == "url":
            raise ValueError("url is not offered, as no pictures are kept here: ask for b64_json")
        if value not in (None, "b64_json"):
            raise ValueError("must be b64_json")
        return value

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value in (None, "auto"):
            return None
        sides = value.split("x")
        if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
            raise ValueError("must be WIDTHxHEIGHT, such as 512x512, or auto")
        if not 0 < int(sides[0]) * int(sides[1]) <= MAX_PIXELS:
            raise ValueError(f"must have 1 to {MAX_PIXELS} pixels")
        return value

    @model_validator(mode="after")
    def _check_partial_images(self) -> ImageBody:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images is only allowed with stream: true")
        return self

    @property
    def width_and_height(self) -> tuple[int | None, int | None]:
        """In pixels; None where the model decides."""
        if self.size is None:
            return None, None
        width, height = map(int, self.size.split("x"))
        return width, height


class GenerationBody(ImageBody):
    """Pictures from a prompt alone."""

    style: str | None = None


class EditBody(ImageBody):
    """The fields beside the files of a form, whose values are all text.

    ``strength`` is how much of the picture is made anew.
    """

    model_config = ConfigDict(strict=False)

    input_fidelity: str | None = None
    strength: float | None = Field(None, gt=0, le=1)
