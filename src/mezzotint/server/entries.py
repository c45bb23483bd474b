"""The entries of a request that may be given several times: their files by listed name, their pictures by upload id.

An entry class of `request.ENTRIES` that has no kind here is left out of the server's bodies: its fields could name
files of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from mezzotint.entries.control import Control
from mezzotint.entries.fields import Name
from mezzotint.entries.regions import Region
from mezzotint.request import ENTRIES
from mezzotint.server.errors import InvalidError
from mezzotint.server.files import encode, inspect_picture

PICTURE = "the id of an upload, or a PNG, JPEG or WebP file in base64, also as a data: URI"
LOW, HIGH = 100.0, 200.0  # Canny's thresholds
Level = Annotated[float, Field(ge=0.0, le=10_000.0)]
Given = Annotated[str, Field(min_length=1)] | Annotated[bytes, Field(min_length=1, strict=True)]  # of a data: URI
_PREPROCESS = ("preprocessor", "low", "high")


@dataclass(frozen=True)
class EntryKind:
    """How the server takes one kind of entry.

    Attributes:
        body: The entry in a body.
        files: By field, the kind of the listing whose names it takes.
        pictures: The fields that hold a picture, or a list of them.
    """

    body: type[BaseModel]
    files: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()


def _kind(
    entry: type[BaseModel],
    files: Mapping[str, str],
    pictures: tuple[str, ...],
    without: tuple[str, ...] = (),
    **more: Any,
) -> EntryKind:
    """Return the kind of an entry class.

    Args:
        entry: The class. Each of its fields that may hold a path has to be in one of the next three.
        files: By field, the kind of the listing whose names it takes.
        pictures: The fields that hold a picture, or a list of them.
        without: The fields that a body may not set.
        **more: Fields that only the body has.
    """
    fields: dict[str, Any] = dict(more)
    fields |= {
        name: (None, Field(default=None, description="left out: the server does not take it")) for name in without
    }
    for name, kind in files.items():
        fields[name] = (Name, Field(description=f"a name from /api/{kind}"))
    for name in pictures:
        several = "tuple[" in str(entry.model_fields[name].annotation)
        given = tuple[Given, ...] if several else Given
        fields[name] = (given | None, Field(default=None, description=f"{PICTURE}{', or a list of them' * several}"))
    body: type[BaseModel] = create_model(
        f"{entry.__name__}Body", __base__=entry, __doc__=(entry.__doc__ or "").partition("\n")[0], **fields
    )
    return EntryKind(body, files, pictures)


KINDS = {
    "regions": _kind(Region, {}, ("mask",)),
    "control": _kind(
        Control,
        {"file": "controls"},
        ("image",),
        without=("more",),  # whose pictures could be files of this machine
        preprocessor=(
            Literal["none", "canny"],
            Field(default="none", description="none or canny: what is made of the picture first"),
        ),
        low=(Level, Field(default=LOW, description="a gradient from 0: canny's lower threshold")),
        high=(Level, Field(default=HIGH, description="a gradient from low: canny's upper threshold")),
    ),
}
LEFT_OUT = tuple(name for (name,) in ENTRIES if name not in KINDS)


def normalise(fields: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of a body by field, each as a dictionary.

    Raises:
        InvalidError: If one is no object.
    """
    found = {}
    for name in KINDS:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping | BaseModel) for each in value):
            raise InvalidError(f"{name} must be a list of objects", name)
        found[name] = [dict(each) for each in value]
    return found


def convert(
    fields: Mapping[str, Any],
    picture: Callable[[Any, str], Any],
    file: Callable[[str, Any, str], Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of a body with their pictures and files converted.

    Args:
        fields: The fields of the body.
        picture: Converts a picture; it is called with its place, such as "control[0].image", too.
        file: Converts a file's name; it is called with the kind of the listing, the name and its place.
    """
    found = normalise(fields)
    for name, entries in found.items():
        kind = KINDS[name]
        for k, entry in enumerate(entries):
            for key in kind.pictures:
                place = f"{name}[{k}].{key}"
                if isinstance(entry.get(key), list | tuple):
                    entry[key] = [picture(each, place) for each in entry[key]]
                elif entry.get(key) is not None:
                    entry[key] = picture(entry[key], place)
            for key, listing in kind.files.items():
                if file is not None and entry.get(key) is not None:
                    entry[key] = file(listing, entry[key], f"{name}[{k}].{key}")
    return found


def pictures_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ids of the uploads that the entries of a stored request name."""
    for name, kind in KINDS.items():
        for entry in fields.get(name) or ():
            for key in kind.pictures:
                value = entry.get(key)
                yield from map(str, value if isinstance(value, list) else [value] if value else [])


def preprocess(entry: dict[str, Any], read: Callable[[Any, str], bytes], place: str, most: int) -> None:
    """Replace the picture of an entry by its edges, if it asks for them, and forget that it has asked.

    Args:
        entry: The entry.
        read: Returns the bytes of a picture, which is given by value or id.
        place: The entry's place, such as "control[0]".
        most: How many pixels the picture may have.

    Raises:
        InvalidError: If there is no picture, or it cannot be read, or it is too large.
    """
    name, low, high = (entry.pop(key, usual) for key, usual in zip(_PREPROCESS, ("none", LOW, HIGH), strict=True))
    if name == "none":
        return
    if name != "canny":
        raise InvalidError(f"{place}.preprocessor is {str(name)[:60]!r}; it must be none or canny", place)
    if entry.get("image") is None:
        raise InvalidError(f"{place}.image is missing; canny needs a picture to find the edges of", f"{place}.image")
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
