"""png-info, and the extras: enlarge pictures without a model."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mezzotint.records import infotext
from mezzotint.server.a1111.route import Route
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, body_schema
from mezzotint.server.dialects import LooseBody, decode_picture, read_body
from mezzotint.server.errors import InvalidError
from mezzotint.server.files import encode
from mezzotint.server.settings import Limits

router = APIRouter(route_class=Route)
UPSCALERS = {"None": None, "Lanczos": "LANCZOS", "Nearest": "NEAREST"}  # by Pillow's names
Share = Annotated[float, Field(ge=0, le=1)]


class PictureBody(LooseBody):
    """A picture."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": "iVBORw0KGgo="}]})

    image: str


class ExtraBody(LooseBody):
    """A picture to enlarge."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": "iVBORw0KGgo=", "upscaler_1": "Lanczos"}]})

    image: str
    resize_mode: Annotated[int, Field(ge=0, le=1)] = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=64)] = 2.0
    upscaling_resize_w: Annotated[int, Field(ge=1, le=100_000)] = 512
    upscaling_resize_h: Annotated[int, Field(ge=1, le=100_000)] = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: Share = 0.0
    gfpgan_visibility: Share = 0.0
    codeformer_visibility: Share = 0.0


@router.post("/png-info", openapi_extra=body_schema(PictureBody))
async def png_info(request: Request) -> JSONResponse:
    """Read the settings in a picture: the text as it is, split into fields, and the picture's other texts."""
    body = await read_body(request, PictureBody)
    return JSONResponse(await run_in_threadpool(_read_info, body))


def _read_info(body: PictureBody) -> dict[str, Any]:
    from mezzotint.images.io import read_metadata

    data = decode_picture(body.image.strip(), "image")
    items = read_metadata(data, None)
    text = items.pop("parameters", "")
    parsed = infotext.parse(text)
    parameters = {"Prompt": parsed.prompt, "Negative prompt": parsed.negative_prompt, **parsed.fields} if text else {}
    width, cross, height = parameters.get("Size", "").partition("x")
    if cross:
        parameters |= {"Size-1": width, "Size-2": height}
    return {"info": text, "items": items, "parameters": parameters}


@router.post("/extra-single-image", openapi_extra=body_schema(ExtraBody))
async def extra_single_image(request: Request, core: Core) -> JSONResponse:
    """Enlarge a picture by the resampling filter of upscaler_1, mixed with that of upscaler_2."""
    body = await read_body(request, ExtraBody)
    data, note = await run_in_threadpool(_enlarge, body, core.settings.limits)
    return JSONResponse({"html_info": note, "image": base64.b64encode(data).decode()})


def _enlarge(body: ExtraBody, limits: Limits) -> tuple[bytes, str]:
    from PIL import Image

    from mezzotint.images.init_image import open_picture

    for name in ("upscaler_1", "upscaler_2"):
        if getattr(body, name) not in UPSCALERS:
            raise InvalidError(f"{name} is {getattr(body, name)[:60]!r}; it must be {', '.join(UPSCALERS)}", name)
    data = decode_picture(body.image, "image")
    image = open_picture(data)
    notes = [
        f"{name} is not supported" for name in ("gfpgan_visibility", "codeformer_visibility") if getattr(body, name) > 0
    ]
    first, second = UPSCALERS[body.upscaler_1], UPSCALERS[body.upscaler_2]
    if first is not None:
        wanted = body.upscaling_resize_w, body.upscaling_resize_h
        factor = body.upscaling_resize
        if body.resize_mode == 1:
            factor = max(wanted[0] / image.width, wanted[1] / image.height)
        size = max(int(image.width * factor), 1), max(int(image.height * factor), 1)
        if size[0] * size[1] > limits.pixels:
            raise InvalidError(
                f"the picture would have {size[0]}x{size[1]} pixels; at most {limits.pixels:,} are allowed",
                "upscaling_resize",
            )
        enlarged = image.resize(size, Image.Resampling[first])
        if second is not None and body.extras_upscaler_2_visibility > 0:
            other = image.resize(size, Image.Resampling[second])
            enlarged = Image.blend(enlarged, other, body.extras_upscaler_2_visibility)
        image = enlarged
        if body.resize_mode == 1 and body.upscaling_crop:
            left, top = (size[0] - wanted[0]) // 2, (size[1] - wanted[1]) // 2
            image = image.crop((left, top, left + wanted[0], top + wanted[1]))
    return encode(image, "PNG"), ". ".join(notes)
