"""ControlNets and T2I-Adapters of a Request, and the conditioning picture that is arithmetic. Does not import torch.

edges = mezzotint.control.canny("photo.png")
mezzotint.Request("a house", control=[{"file": "control_v11p_sd15_canny.pth", "image": edges, "end": 0.6}])
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mezzotint.entries.fields import Entry, Name, Picture, Share, given_fields

MODES = ("balanced", "prompt", "control", "guess")
RESIZE_MODES = ("resize", "crop", "fill")
TYPES = {  # of ControlNet Union
    **dict.fromkeys(("openpose", "pose"), 0),
    "depth": 1,
    **dict.fromkeys(("softedge", "hed", "scribble"), 2),
    **dict.fromkeys(("canny", "lineart", "mlsd"), 3),
    "normal": 4,
    "segment": 5,
    **dict.fromkeys(("tile", "blur"), 6),
    **dict.fromkeys(("repaint", "inpaint"), 7),
}
REPAINT = 7
MAX_TYPE = 63
MAX_MORE = 15  # further pictures of an entry
_TYPE = "openpose, depth, softedge, canny, normal, segment, tile, repaint or a number (of a ControlNet Union)"

PictureType = Annotated[int, Field(ge=0, le=MAX_TYPE)] | Annotated[str, Field(pattern=f"^({'|'.join(TYPES)})$")]


def _given(value: Any) -> Any:
    """Return an entry's fields without empty cells, and the number of a type as one."""
    value = given_fields(value)
    kind = value.get("type") if isinstance(value, Mapping) else None
    return {**value, "type": int(kind)} if isinstance(kind, str) and kind.isdecimal() else value


class ControlPicture(Entry):
    """A further picture that a ControlNet Union reads in the same pass.

    Attributes:
        image: The conditioning picture.
        type: What it is; see `Control`.
        scale: Factor of its features.
    """

    image: Picture | None = Field(  # a record has none where bytes were given
        default=None, description="a picture: the path of a file, its bytes, or a PIL image"
    )
    type: PictureType = Field(description=_TYPE)
    scale: Annotated[float, Field(ge=0.0, le=100.0)] = Field(default=1.0, description="a number from 0 to 100")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return _given(value)


class Control(Entry):
    """A ControlNet or T2I-Adapter of a Request.

    Attributes:
        file: A file, a folder or a hub id, which may go on with a path inside of the repository; a T2I-Adapter is told
            apart by its keys.
        image: The conditioning picture; None is the picture that the run starts from, -1 where it is masked.
        scale: Factor of what it adds to the UNet's features.
        start: Share of the steps after which it begins to act.
        end: Share of the steps after which it no longer acts.
        mode: "balanced"; "prompt" and "control", A1111's "My prompt is more important" and "ControlNet is more
            important"; or "guess", diffusers' guess mode, of ControlNets alone.
        resize_mode: How a picture of another shape is fitted, as an image to start from is.
        type: What the picture of a ControlNet Union is, by name or number.
        more: Further pictures that a ControlNet Union reads in the same pass. Each picture's features then have the
            picture's own scale, and what the network adds has none.
    """

    file: Name = Field(description="a ControlNet or T2I-Adapter: a file, a folder or a hub id (owner/name[/path])")
    image: Picture | None = Field(
        default=None,
        description="a picture: the path of a file, its bytes, or a PIL image (None: the image to start from)",
    )
    scale: Annotated[float, Field(ge=0.0, le=100.0)] = Field(default=1.0, description="a number from 0 to 100")
    start: Share = Field(default=0.0, description="a share of the steps from 0 to 1, below end")
    end: Share = Field(default=1.0, description="a share of the steps from 0 to 1, above start")
    mode: str = Field(
        default="balanced", pattern=f"^({'|'.join(MODES)})$", description=f"{', '.join(MODES[:-1])} or {MODES[-1]}"
    )
    resize_mode: str = Field(
        default="resize",
        pattern=f"^({'|'.join(RESIZE_MODES)})$",
        description="resize (stretch), crop or fill (how a picture of another shape is fitted)",
    )
    type: PictureType | None = Field(default=None, description=_TYPE)
    more: Annotated[tuple[ControlPicture, ...], Field(min_length=1, max_length=MAX_MORE)] | None = Field(
        default=None,
        description=f"a list of at most {MAX_MORE} further pictures of a ControlNet Union: each has image, type, scale",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return _given({"file": value} if isinstance(value, str | PathLike) else value)

    @property
    def pictures(self) -> dict[str, str | bytes | None]:
        """The pictures, by field."""
        return {"image": self.image, **{f"more[{j}].image": one.image for j, one in enumerate(self.more or ())}}

    @property
    def types(self) -> list[int | None]:
        """The number of each picture's type."""
        given = [self.type, *(one.type for one in self.more or ())]
        return [TYPES[kind] if isinstance(kind, str) else kind for kind in given]

    @property
    def scales(self) -> list[float]:
        """The scale of each picture."""
        return [self.scale, *(one.scale for one in self.more or ())]

    def with_pictures(self, pictures: Mapping[str, str | None]) -> Self:
        """Return a copy with other pictures, by field."""
        more = [one.model_dump() | {"image": pictures.get(f"more[{j}].image")} for j, one in enumerate(self.more or ())]
        return self.replace(image=pictures.get("image"), more=more or None)
