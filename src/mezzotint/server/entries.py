"""The entries of a request that may be given several times: their files by listed name, their pictures by upload id.

An entry class of `request.ENTRIES` without a kind here is left out of the server's bodies: its fields could name files
of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from mezzotint.entries.control import MAX_MORE, Control, ControlPicture
from mezzotint.entries.fields import Name
from mezzotint.entries.ip_adapter import MAX_PICTURES, IPAdapter
from mezzotint.entries.regions import Region
from mezzotint.request import ENTRIES
from mezzotint.server.errors import InvalidError
from mezzotint.server.files import encode, inspect_picture

PICTURE = "the id of an upload, or a PNG, JPEG or WebP file in base64, also as a data: URI"
LOW, HIGH = 100.0, 200.0  # Canny's thresholds
Level = Annotated[float, Field(ge=0.0, le=10_000.0)]
Given = Annotated[str, Field(min_length=1)] | Annotated[bytes, Field(min_length=1, strict=True)]  # of a data: URI


@dataclass(frozen=True)
class EntryKind:
    """A kind of entry in the body of a job.

    Attributes:
        body: The entry in a body.
        files: By field, the kind of the listing whose names it takes.
        pictures: The fields that hold a picture, or a list of them.
        nested: By field, the kind of the entries in it.
        canny: Whether the edges of its picture may be asked for.
    """

    body: type[BaseModel]
    files: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    nested: Mapping[str, EntryKind] = field(default_factory=dict)
    canny: bool = False


Found = tuple[dict[str, Any], EntryKind, str]  # an entry, its kind, and its place


def _kind(
    entry: type[BaseModel],
    files: Mapping[str, str],
    pictures: tuple[str, ...],
    *,
    nested: Mapping[str, EntryKind] | None = None,
    canny: bool = False,
) -> EntryKind:
    """Return the kind of an entry class, each of whose fields that may hold a path is in one of these arguments.

    Args:
        entry: The class.
        files: By field, the kind of the listing whose names it takes.
        pictures: The fields that hold a picture, or a list of them.
        nested: By field, the kind of the entries in it.
        canny: Whether the edges of its picture may be asked for.
    """
    fields: dict[str, Any] = dict(_CANNY) if canny else {}
    for name, kind in files.items():
        wanted: Any = Field(description=f"a name from /api/{kind}")
        optional: Any = Field(default=None, description=f"a name from /api/{kind}")
        fields[name] = (Name, wanted) if entry.model_fields[name].is_required() else (Name | None, optional)
    for name in pictures:
        many = "tuple[" in str(entry.model_fields[name].annotation)
        given: Any = Annotated[tuple[Given, ...], Field(min_length=1, max_length=MAX_PICTURES)] if many else Given
        fields[name] = (given | None, Field(default=None, description=f"{PICTURE}{', or a list of them' * many}"))
    for name, inner in (nested or {}).items():
        several: Any = Annotated[tuple[inner.body, ...], Field(min_length=1, max_length=MAX_MORE)]  # type: ignore[name-defined]
        fields[name] = (several | None, Field(default=None, description=entry.model_fields[name].description))
    body: type[BaseModel] = create_model(
        f"{entry.__name__}Body", __base__=entry, __doc__=(entry.__doc__ or "").partition("\n")[0], **fields
    )
    return EntryKind(body, files, pictures, nested or {}, canny)


_CANNY: dict[str, Any] = {
    "preprocessor": (
        Literal["none", "canny"],
        Field(default="none", description="none or canny: what is made of the picture first"),
    ),
    "low": (Level, Field(default=LOW, description="a gradient from 0: canny's lower threshold")),
    "high": (Level, Field(default=HIGH, description="a gradient from low: canny's upper threshold")),
}
_MORE = _kind(ControlPicture, {}, ("image",), canny=True)
KINDS = {
    "control": _kind(Control, {"file": "controls"}, ("image",), nested={"more": _MORE}, canny=True),
    "ip_adapter": _kind(
        IPAdapter, {"file": "ip_adapters", "encoder": "encoders", "embeds": "image_embeds"}, ("image", "mask")
    ),
    "regions": _kind(Region, {}, ("mask",)),
}
LEFT_OUT = tuple(name for (name,) in ENTRIES if name not in KINDS)


def normalise(fields: Mapping[str, Any], kinds: Mapping[str, EntryKind] = KINDS, place: str = "") -> dict[str, Any]:
    """Return the entries of a body by field, each as a dictionary.

    Args:
        fields: The fields of the body.
        kinds: The kinds of entries, by field.
        place: What stands before a field's name in errors.

    Raises:
        InvalidError: If one is no object.
    """
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping | BaseModel) for each in value):
            raise InvalidError(f"{place}{name} must be a list of objects", name)
        found[name] = [dict(each) for each in value]
        for k, entry in enumerate(found[name]):
            entry |= normalise(entry, kind.nested, f"{place}{name}[{k}].")
    return found


def walk(fields: Mapping[str, Any], kinds: Mapping[str, EntryKind] = KINDS, place: str = "") -> Iterator[Found]:
    """Yield each entry of normalised fields, those within others too, with its kind and its place."""
    for name, kind in kinds.items():
        for k, entry in enumerate(fields.get(name) or ()):
            yield entry, kind, f"{place}{name}[{k}]"
            yield from walk(entry, kind.nested, f"{place}{name}[{k}].")


def convert(
    fields: Mapping[str, Any],
    picture: Callable[[Any, str], Any],
    file: Callable[[str, Any, str], Any] | None = None,
) -> dict[str, Any]:
    """Return the entries of a body with their pictures and files converted.

    Args:
        fields: The fields of the body.
        picture: Converts a picture; it is called with its place, such as "control[0].image", too.
        file: Converts a file's name; it is called with the kind of the listing, the name and its place.
    """
    found = normalise(fields)
    for entry, kind, place in walk(found):
        for key in kind.pictures:
            if isinstance(entry.get(key), list | tuple):
                entry[key] = [picture(each, f"{place}.{key}[{k}]") for k, each in enumerate(entry[key])]
            elif entry.get(key) is not None:
                entry[key] = picture(entry[key], f"{place}.{key}")
        for key, listing in kind.files.items():
            if file is not None and entry.get(key) is not None:
                entry[key] = file(listing, entry[key], f"{place}.{key}")
    return found


def pictures_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ids of the uploads that the entries of a stored request name."""
    for entry, kind, _ in walk(fields):
        for key in kind.pictures:
            value = entry.get(key)
            yield from map(str, value if isinstance(value, list) else [value] if value else [])


def preprocess(fields: Mapping[str, Any], read: Callable[[Any, str], bytes], most: int) -> None:
    """Replace the picture of each entry that asks for it by its edges, and forget that it has asked.

    Args:
        fields: Normalised fields, which change.
        read: Returns the bytes of a picture, which is given by value or id.
        most: How many pixels the picture may have.

    Raises:
        InvalidError: If there is no picture, or it cannot be read, or it is too large.
    """
    for entry, kind, place in walk(fields):
        if not kind.canny:
            continue
        name, low, high = (entry.pop(key, usual) for key, usual in zip(_CANNY, ("none", LOW, HIGH), strict=True))
        if name == "none":
            continue
        if name != "canny":
            raise InvalidError(f"{place}.preprocessor is {str(name)[:60]!r}; it must be none or canny", place)
        if entry.get("image") is None:
            raise InvalidError(
                f"{place}.image is missing; canny needs a picture to find the edges of", f"{place}.image"
            )
        entry["image"] = edges(read(entry["image"], f"{place}.image"), low, high, f"{place}.image", most)


def edges(data: bytes, low: float, high: float, param: str, most: int) -> bytes:
    """Return the edges of a picture as a PNG file.

    Raises:
        InvalidError: If the picture cannot be read or has more than `most` pixels, or `low` is above `high`.
    """
    from mezzotint.images.canny import find_edges
    from mezzotint.images.init_image import open_picture

    _, width, height = inspect_picture(data, param)
    if width * height > most:
        raise InvalidError(f"{param} has {width}x{height} pixels; at most {most:,} are allowed for canny", param)
    if not 0.0 <= low <= high:
        raise InvalidError(f"low is {low:g} and high {high:g}; they must be gradients with 0 <= low <= high", param)
    return encode(find_edges(open_picture(data, param), low, high), "PNG")
