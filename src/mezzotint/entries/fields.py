"""Types and checks that a Request and its entries share. Importing this does not import torch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator
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


class Entry(BaseModel):
    """Base of what a Request may have several of: frozen; unknown fields, NaN and booleans for numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return given_fields(value)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):  # Python's True would pass as 1
            raise PydanticCustomError("boolean", "a boolean")
        return value

    @field_validator("file", "encoder", mode="before", check_fields=False)
    @classmethod
    def _paths_are_names(cls, value: Any) -> Any:
        return fspath(value) if isinstance(value, PathLike) else value

    @field_validator("image", "mask", mode="before", check_fields=False)
    @classmethod
    def _pictures_are_sources(cls, value: Any) -> Any:
        return picture_source(value)

    @field_serializer("image", "mask", when_used="json-unless-none", check_fields=False)
    def _to_json(self, value: Any) -> Any:
        return to_uri(value)

    @field_validator("end", check_fields=False)  # of entries that act in a part of the steps
    @classmethod
    def _end_follows_start(cls, value: float, info: Any) -> float:
        if value <= info.data.get("start", 0.0):
            raise PydanticCustomError("order", "not above start")
        return value

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the fields, without the bytes of pictures."""
        for name, value in super().__repr_args__():
            if isinstance(value, tuple):
                value = tuple(Bytes(each) if isinstance(each, bytes) else each for each in value)
            yield name, Bytes(value) if isinstance(value, bytes) else value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


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


def given_fields(value: Any) -> Any:
    """Return an entry without the fields that are None, as tables have them where another row has a value."""
    if not isinstance(value, Mapping):
        return value
    return {name: as_tuples(each) for name, each in value.items() if each is not None}


def as_tuples(value: Any, depth: int = 4) -> Any:
    """Return lists within lists as tuples: JSON has none, and the server is strict."""
    return tuple(as_tuples(each, depth - 1) for each in value) if depth and isinstance(value, list | tuple) else value


def _from_uri(text: str) -> bytes:
    """Decode a data: URI to bytes."""
    head, _, data = text.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise PydanticCustomError("uri", "no base64") from None
