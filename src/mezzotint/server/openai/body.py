"""The bodies of generations and edits, and their translation to requests.

Besides that API's fields there are those that other servers of its kind take: negative_prompt, seed, steps (also as
num_inference_steps, or step), guidance_scale and, for edits, strength.
"""

from __future__ import annotations

import io
import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, ConfigDict, Field

from mezzotint.server.dialects import LooseBody
from mezzotint.server.errors import InvalidError
from mezzotint.server.files import encode, inspect_picture
from mezzotint.server.service import Service
from mezzotint.server.settings import Limits

MAX_COUNT = 10  # that API's own
# the client's name of a field of Request, for sentences
NAMES = {"width": "size", "height": "size", "count": "n"}


class Generation(LooseBody):
    """The body of a generation."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a lemon on a blue background", "size": "512x512"}]},
    )

    prompt: Annotated[str, Field(min_length=1)]
    model: str = ""
    n: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    size: str = "auto"
    response_format: Literal["url", "b64_json"] | None = None
    background: Literal["auto", "opaque"] = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = Field(default=None, validation_alias=AliasChoices("steps", "num_inference_steps", "step"))
    guidance_scale: float | None = None

    @property
    def links(self) -> bool:
        """Whether the reply has URLs: where they are asked for, and by default for the models that give them."""
        return self.response_format == "url" or (self.response_format is None and self.model.startswith("dall-e"))

    def fields(self) -> dict[str, Any]:
        """Return the fields of a Request. Raises InvalidError."""
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")
        found = {name: getattr(self, name) for name in names} | {"count": self.n}
        return {name: value for name, value in found.items() if value is not None} | self._size()

    def _size(self) -> dict[str, int]:
        if self.size == "auto":
            return {}
        sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", self.size)
        if sides is None:
            raise InvalidError(f"size is {self.size[:60]!r}; it must be auto, or as 512x768", "size")
        return {"width": int(sides[1]), "height": int(sides[2])}


class Edit(Generation):
    """The body of an edit."""

    strength: float | None = None


def edit_fields(body: Edit, image: bytes, mask: bytes | None, limits: Limits) -> dict[str, Any]:
    """Return the fields of a Request for an edit.

    Args:
        body: The other fields.
        image: The picture. Without a mask, its transparent parts are drawn; all of it if it has none.
        mask: A picture whose transparent parts are drawn.
        limits: The limits of a request.

    Raises:
        InvalidError: If a picture cannot be read, or the mask has no transparent parts.
    """
    fields = body.fields()
    _, width, height = inspect_picture(image, "image")
    if "width" not in fields:
        fields |= {"width": max(width // 8, 1) * 8, "height": max(height // 8, 1) * 8}
        if fields["width"] * fields["height"] > limits.pixels:
            raise InvalidError(
                f"image has {width}x{height} pixels, and at most {limits.pixels:,} are drawn; give a smaller size",
                "size",
            )
    if mask is not None:
        inspect_picture(mask, "mask")
        holes = _transparent_parts(mask)
        if holes is None:
            raise InvalidError("mask has no transparent parts; those are what is drawn", "mask")
    else:
        holes = _transparent_parts(image)
    fields |= {"image": image, "resize_mode": "crop"}
    if holes is not None:
        fields["mask"] = holes
    if body.strength is not None:
        fields["strength"] = body.strength
    return fields


def _transparent_parts(data: bytes) -> bytes | None:
    """Return where a picture is transparent, as a mask that is white there; None if it is nowhere."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else encode(ImageOps.invert(alpha), "PNG")


def find_model(core: Service, name: str) -> str:
    """Return the listed model of a name; the default for any other, since clients send that API's own names."""
    listed = next((known for known in core.models.paths if known.lower() == name.lower()), None)
    return listed or core.default_model


def rename(error: InvalidError) -> InvalidError:
    """Return an error with the client's name of its field."""
    name = NAMES.get(error.param or "")
    return error if name is None else InvalidError(f"{name}: {error}", name)
