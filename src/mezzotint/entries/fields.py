"""Types and checks that a Request and its entries share. Importing this does not import torch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import PydanticCustomError

DATA_URI = "data:"  # how JSON holds the bytes of a picture: data:...;base64,...
MAX_PROMPT = 100_000  # characters; a CLIP window of 77 tokens holds about 300

Text = Annotated[str, Field(max_length=MAX_PROMPT)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]  # of a file, folder or hub repository
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Picture = Annotated[str, Field(min_length=1, max_length=4096)] | Annotated[bytes, Field(min_length=1, strict=True)]


class Bytes:
    """Stand in for bytes in a repr."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)

    def __repr__(self) -> str:
        return f"<{self.size:,} bytes>"


def picture_source(value: Any) -> Any:
    """Return a given picture as it is stored: a path, or the bytes of a file."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _from_uri(value) if value.startswith(DATA_URI) else value
    from mezzotint.images.init_image import to_source  # it brings Pillow

    return to_source(value)


def to_uri(value: str | bytes) -> str:
    """Return a picture's source for JSON: its path, or its bytes as a data: URI."""
    return value if isinstance(value, str) else f"{DATA_URI};base64,{base64.b64encode(value).decode()}"


def refuse_boolean(value: Any) -> Any:
    """Return a value that is not True or False, which Python would pass as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "a boolean")
    return value


def given_fields(value: Any) -> Any:
    """Return an entry without the fields that are None, as tables have them where another row has a value."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, Mapping) else value


def _from_uri(text: str) -> bytes:
    """Decode a data: URI to bytes."""
    head, _, data = text.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise PydanticCustomError("uri", "no base64") from None
