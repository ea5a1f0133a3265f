"""``/v1/images/generations`` and ``/v1/images/edits``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from fuserve.diffusion.image_params import ImageParams
from fuserve.errors import InvalidRequestError, UnsupportedModelError
from fuserve.server.answer import json_answer
from fuserve.server.errors import ApiError, invalid
from fuserve.server.event_stream import EventStream
from fuserve.server.facts import facts_of
from fuserve.server.images.context import ImageContext
from fuserve.server.images.params import edit_params, field_error, generation_params
from fuserve.server.images.pictures import read_picture
from fuserve.server.images.reply import ImageReply
from fuserve.server.protocol.image import EditBody, GenerationBody, ImageBody

_IMAGE_FIELDS = ("image", "image[]")
_MAX_FILES = 4
_MAX_FIELDS = 64


def image_router(context: ImageContext) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post("/v1/images/generations", response_model=None)
    async def create_image(body: GenerationBody, request: Request) -> Response:
        """Pictures from a prompt."""
        context.check_model(body.model)
        params = generation_params(body)
        return await _answer(context, request, body, params, "image_generation")

    @router.post("/v1/images/edits", response_model=None)
    async def edit_image(request: Request) -> Response:
        """Pictures from a picture, a prompt, and perhaps a mask."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "Send a form: Content-Type: multipart/form-data.")
        async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS) as form:
            body = _edit_body(form)
            context.check_model(body.model)
            image, mask = await _file(form, _IMAGE_FIELDS), await _file(form, ("mask",))
        if image is None:
            raise invalid("image", "image is missing: send the picture to edit as a file.")
        params = await context.workers.run(_edit_params, context, body, image, mask)
        return await _answer(context, request, body, params, "image_edit")

    return router


async def _answer(
    context: ImageContext, request: Request, body: ImageBody, params: ImageParams, kind: str
) -> Response:
    facts = facts_of(request.scope)
    facts.model, facts.streams = context.name, bool(body.stream)
    if context.config.log_prompts:
        facts.prompt = body.prompt
    # A long prompt would hold up the event loop; and once it is submitted, nothing may be awaited
    # but its stream, which ends with its reader.
    num_tokens = await context.workers.run(context.engine.model.count_tokens, body.prompt)
    try:
        stream = context.engine.submit(
            body.prompt,
            params,
            num_previews=body.partial_images or 0,
            client=facts.client,
            timeout_s=context.config.request_timeout_s,
        )
    except InvalidRequestError as error:
        raise field_error(error) from error
    except UnsupportedModelError as error:
        if body.scheduler is None:
            raise
        raise invalid("scheduler", str(error)) from error
    facts.engine_request_id = stream.request_id
    reply = ImageReply(context, kind, stream, num_tokens, facts)
    if body.stream:
        return EventStream(reply.events())
    return await json_answer(request, reply.whole())


def _edit_params(
    context: ImageContext, body: EditBody, image: bytes, mask: bytes | None
) -> ImageParams:
    return edit_params(
        body,
        context.engine.model,
        read_picture(image, "image"),
        None if mask is None else read_picture(mask, "mask"),
    )


def _edit_body(form: FormData) -> EditBody:
    """The fields that are no files.

    Raises:
        RequestValidationError: as FastAPI raises it for a body in JSON.
    """
    given: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            given[name] = value
        elif name not in (*_IMAGE_FIELDS, "mask"):
            raise invalid(name, f"{name} is not a field for a file.")
    try:
        return EditBody.model_validate(given)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems, body=given) from error


async def _file(form: FormData, names: tuple[str, ...]) -> bytes | None:
    files = [file for name in names for file in form.getlist(name)]
    if len(files) > 1:
        raise invalid(names[0], f"{names[0]} may be one picture; there are {len(files)}.")
    if not files:
        return None
    if not isinstance(files[0], UploadFile):
        raise invalid(names[0], f"{names[0]} must be a file.")
    return await files[0].read()
