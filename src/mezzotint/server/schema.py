"""The body of a job: the fields of Request, with pictures by value or upload id and files by listed name.

`JobBody` is derived from Request, so that a new field of Request is a new field here. Folders are left out: those that
the server was started with are used.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from mezzotint.errors import MezzotintError, RequestError
from mezzotint.request import Request
from mezzotint.server import entries
from mezzotint.server.entries import PICTURE
from mezzotint.server.errors import InvalidError
from mezzotint.server.files import ID, DataFolder
from mezzotint.server.history import History
from mezzotint.server.models import Models
from mezzotint.server.settings import Limits, Settings

FOLDERS = ("lora_folder", "wildcards")
LEFT_OUT = (*FOLDERS, *entries.LEFT_OUT)
PICTURES = ("image", "mask")
FILES = {"loras": "loras", "embeddings": "embeddings"}  # fields of names, and the kinds of their listings
_NAMES = {
    "loras": "a list of at most 100 LoRAs: (a name from /api/loras, scale) or (name, UNet scale, text encoder scale)",
    "embeddings": "a list of at most 1000 names from /api/embeddings",
    "refiner": "a name from /api/models, usually of SDXL's refiner",
    "control": "a list of at most 16 ControlNets and T2I-Adapters, each an object with file (a name from "
    "/api/controls), image, scale, start, end, mode, resize_mode, type, more and preprocessor",
    "ip_adapter": "a list of at most 16 IP-Adapters, each an object with file (a name from /api/ip_adapters), image or "
    "embeds (a name from /api/image_embeds), encoder (a name from /api/encoders), scale, start, end and mask",
}
_GROUPS = {
    "prompt": "prompt negative_prompt prompt_syntax emphasis embeddings loras choices clip_skip regions region_base",
    "sampling": "width height steps sampler spacing sigmas timesteps discard_penultimate_sigma seed count batch eta "
    "noise seamless variation_seed variation_strength seed_size",
    "guidance": "guidance_scale guidance_method guidance_rescale guidance_interval guidance_steps apg_eta apg_momentum "
    "apg_norm_threshold cfg_zero_init_steps perp_neg_scale mimic_scale threshold_percentile pag_scale pag_layers "
    "pag_adaptive_scale freeu",
    "picture": "image mask fix_steps strength resize_mode mask_blur invert_mask differential masked_content "
    "only_masked outpaint tile",
    "control": "control ip_adapter",
    "hires": "hires hires_upscale hires_steps hires_strength",
    "sdxl": "original_size crop target_size refiner refiner_at aesthetic_score negative_aesthetic_score",
    "safety": "safety",
}
GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}


def _fields() -> dict[str, Any]:
    """Return the fields of a body for `create_model`."""
    fields: dict[str, Any] = {}
    for name, field in Request.model_fields.items():
        if name in LEFT_OUT:
            continue
        if name in PICTURES:
            text = Annotated[str, Field(min_length=1)]
            fields[name] = (text | None, Field(default=None, description=PICTURE))
        elif name == "hires_upscale":  # a client names no file of an upscaler
            words = Literal["latent", "pixels"]
            fields[name] = (words | None, Field(default=None, description="latent or pixels: what is enlarged"))
        else:
            changed = field._copy()
            changed.description = _NAMES.get(name, field.description)
            kind = entries.KINDS.get(name)
            fields[name] = (tuple[kind.body, ...] | None if kind else field.annotation, changed)  # type: ignore[name-defined]
    return fields


_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
JobBody: type[BaseModel] = create_model(
    "JobBody", __config__=_CONFIG, __doc__="What to draw: the fields of a Request.", **_fields()
)


def describe_fields() -> list[dict[str, Any]]:
    """Describe the fields of a body for a form: name, group, help, default, JSON schema."""
    schema = JobBody.model_json_schema(ref_template="#/components/schemas/{model}")
    return [
        {
            "name": name,
            "group": GROUP_OF.get(name, "sampling"),
            "help": field.description,
            "default": None if field.is_required() else field.default,
            "required": field.is_required(),
            "schema": schema["properties"][name],
        }
        for name, field in JobBody.model_fields.items()
    ]


class Translator:
    """Turns bodies into stored requests, and those into Requests.

    Args:
        settings: The settings of the server.
        models: The listings of names.
        folder: The data folder.
        history: Keeps the uploads.
    """

    def __init__(self, settings: Settings, models: Models, folder: DataFolder, history: History) -> None:
        self._settings, self._models, self._folder, self._history = settings, models, folder, history

    def store(self, fields: Mapping[str, Any], model: str) -> dict[str, Any]:
        """Return the fields of a body as a job keeps them: checked, pictures as upload ids, with a seed.

        Args:
            fields: The fields of a body.
            model: The listed name of the model, whose size is that of a body without one.

        Raises:
            InvalidError: If a field is wrong, names what is not listed, or asks for more than the limits.
        """
        stored = {name: value for name, value in fields.items() if value is not None}
        for name in LEFT_OUT:
            stored.pop(name, None)
        stored |= entries.normalise(stored)
        if "embeddings" not in stored:
            prompts = [str(stored.get(name, "")) for name in ("prompt", "negative_prompt")]
            prompts += [str(region.get("prompt", "")) for region in stored.get("regions", ())]
            if named := self._models.embeddings_in("\n".join(prompts)):
                stored["embeddings"] = named
        check_limits(stored, self._settings.limits)
        for name in PICTURES:
            if name in stored:
                stored[name] = self._upload(stored[name], name)
        self._check_size(stored, model)
        entries.preprocess(stored, self._bytes_of, self._settings.limits.batch_pixels)
        stored |= entries.convert(stored, self._upload)
        if stored.get("seed") is None:
            stored["seed"] = secrets.randbelow(2**32)  # drawn now, so that a restart gives the same bits
        self.request(stored)
        return stored

    def request(self, stored: Mapping[str, Any]) -> Request:
        """Return the Request of a stored one.

        Raises:
            InvalidError: If a field is wrong, or names what is not there.
        """
        fields = dict(stored)
        for name in PICTURES:
            if name in fields:
                fields[name] = self._read_upload(str(fields[name]), name)
        fields |= entries.convert(fields, lambda id, place: self._read_upload(str(id), place), self._find_file)
        for name, kind in FILES.items():
            if fields.get(name):
                fields[name] = [self._find(kind, entry, name) for entry in fields[name]]
        if fields.get("refiner"):
            fields["refiner"] = self._models.find_source(str(fields["refiner"]), "refiner")
        if self._settings.loras is not None:
            fields["lora_folder"] = str(self._settings.loras)
        if self._settings.wildcards is not None and fields.get("prompt_syntax") == "comfy":
            fields["wildcards"] = str(self._settings.wildcards)
        try:
            return Request(**fields)
        except RequestError as error:
            message = str(error)
            word = message.split(" ", 1)[0].partition("[")[0]
            raise InvalidError(message, word if word in Request.model_fields else None) from None

    def message(self, error: MezzotintError) -> str:
        """Return an error's sentence without the folders of the server."""
        text = str(error)
        for folder in (*self._settings.folders().values(), self._folder.path):
            text = text.replace(f"{folder}/", "").replace(str(folder), f"the server's {folder.name}")
        return text

    def _find(self, kind: str, entry: Any, param: str) -> Any:
        if isinstance(entry, str):
            return self._models.find(kind, entry, param)
        if isinstance(entry, list | tuple) and entry and isinstance(entry[0], str):
            return [self._models.find(kind, entry[0], param), *entry[1:]]
        raise InvalidError(f"{param} must be {_NAMES[param]}", param)

    def _find_file(self, kind: str, name: Any, param: str) -> str:
        if not isinstance(name, str):
            raise InvalidError(f"{param} must be a name from /api/{kind}", param)
        return self._models.find(kind, name, param)

    def _bytes_of(self, value: Any, param: str) -> bytes:
        """Return a picture that is given by value or id."""
        return value if isinstance(value, bytes) else self._read_upload(self._upload(value, param), param)

    def _upload(self, value: Any, param: str) -> str:
        """Return the id of the upload of a picture that is given by value or id."""
        if isinstance(value, bytes):
            return str(self._history.upload(value, param)["id"])
        if not isinstance(value, str):
            raise InvalidError(f"{param} must be {PICTURE}", param)
        if ID.fullmatch(value):
            self._read_upload(value, param)
            return value
        return str(self._history.upload(decode_base64(value, param), param)["id"])

    def _check_size(self, stored: Mapping[str, Any], model: str) -> None:
        """Check the sizes that a body does not say: that of its picture, or of the model.

        Raises:
            InvalidError: If they are above the limits.
        """
        limits = self._settings.limits
        image, inner = stored.get("image"), stored.get("only_masked") is not None
        size = (0, 0)
        if image is not None:
            from mezzotint.images.init_image import picture_size

            left, top, right, bottom = stored.get("outpaint") or (0, 0, 0, 0)
            width, height = picture_size(self._read_upload(str(image), "image"))
            size = width + left + right, height + top + bottom
            if inner and size[0] * size[1] > limits.batch_pixels:  # the result is pasted into the whole of it
                raise InvalidError(
                    f"image gives a picture of {size[0]}x{size[1]} pixels; at most {limits.batch_pixels:,} pixels are "
                    "allowed",
                    "image",
                )
        if stored.get("width") and stored.get("height"):
            return
        if image is None or inner:
            if not stored.get("hires") and (stored.get("batch") or 1) == 1:
                return  # no model's own size is above the limits
            size = self._models.own_size(model)
        width, height = stored.get("width") or size[0], stored.get("height") or size[1]
        try:
            check_limits({**stored, "width": width, "height": height}, limits)
        except InvalidError as error:
            given = "the image's size" if image is not None and not inner else "the model's own size"
            raise InvalidError(f"{error}. Without width and height, {given} is drawn", error.param) from None

    def _read_upload(self, id: str, param: str) -> bytes:
        try:
            return self._folder.file("uploads", id).read_bytes()
        except (OSError, ValueError):
            raise InvalidError(f"{param} is the upload {id[:64]!r}, which does not exist", param) from None


def decode_base64(text: str, param: str) -> bytes:
    """Return the bytes of base64 text, which may be a data: URI. Raises InvalidError."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        raise InvalidError(f"{param} must be {PICTURE}", param) from None


def check_limits(fields: Mapping[str, Any], limits: Limits) -> None:
    """Check that a request asks for no more than the limits, before any work.

    Raises:
        InvalidError: If it asks for more.
    """

    def check(name: str, value: Any, limit: int, what: str) -> None:
        if isinstance(value, int | float) and value > limit:
            raise InvalidError(f"{name} asks for {value:,} {what}; at most {limit:,} are allowed", name)

    for name in ("prompt", "negative_prompt"):
        if isinstance(fields.get(name), str):
            check(name, len(fields[name]), limits.prompt, "characters")
    for region in fields.get("regions") or ():
        check("regions", len(str(region.get("prompt", ""))), limits.prompt, "characters")
    for name in ("steps", "hires_steps", "cfg_zero_init_steps"):
        check(name, fields.get(name), limits.steps, "steps")
    for name in ("sigmas", "timesteps"):
        if isinstance(fields.get(name), list | tuple):
            check(name, len(fields[name]) - 1, limits.steps, "steps")
    check("count", fields.get("count"), limits.count, "pictures")
    check("batch", fields.get("batch"), limits.count, "pictures")
    width, height, factor = fields.get("width") or 0, fields.get("height") or 0, fields.get("hires") or 1
    if all(isinstance(value, int | float) for value in (width, height, factor)):
        area = int((width or height) * (height or width) * factor**2)
        check("width", area, limits.pixels, "pixels")
        batch = fields.get("batch") or 1
        if isinstance(batch, int):
            check("batch", area * batch, limits.batch_pixels, "pixels at once")
    sides = fields.get("outpaint")
    if isinstance(sides, list | tuple) and all(isinstance(side, int) for side in sides):
        check("outpaint", sum(sides), 4 * int(limits.pixels**0.5), "pixels")
