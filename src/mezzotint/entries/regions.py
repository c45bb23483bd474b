"""Regional prompts of a Request: what is drawn where. Importing this does not import torch.

mezzotint.Request("a meadow", regions=[
{"prompt": "a lemon", "box": (0.0, 0.0, 0.5, 1.0)},
{"prompt": "a whale", "mask": "whale.png", "weight": 2.0},
])
mezzotint.Request("", regions=mezzotint.regions.columns("1,2,1", ["a lemon", "a whale", "a dog"]))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from mezzotint.entries.fields import MAX_PROMPT, Bytes, Entry, Picture, Share, Text
from mezzotint.errors import RequestError

MAX_REGIONS = 32

Box = tuple[Share, Share, Share, Share]


class Region(Entry):
    """A part of the picture with a prompt of its own.

    Attributes:
        prompt: What is drawn there.
        box: (left, top, right, bottom) as shares of the width and height.
        mask: A picture, stretched to that of the run: white is the region, and grey a share of it.
        weight: Weight of the prompt in its region, against those of other regions there and `Request.region_base`.
    """

    prompt: Text = Field(description=f"a text (valid Unicode) of at most {MAX_PROMPT:,} characters")
    box: Box | None = Field(
        default=None,
        description="(left, top, right, bottom), shares of the width and height with 0 <= left < right <= 1 and "
        "0 <= top < bottom <= 1",
    )
    mask: Picture | None = Field(
        default=None, description="a picture: the path of a file, its bytes, or a PIL image; white is the region"
    )
    weight: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        default=1.0, description="a number above 0 and at most 100"
    )

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the fields that differ from their defaults, without the bytes of a mask."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.default:
                yield name, Bytes(value) if isinstance(value, bytes) else value

    @field_validator("box")
    @classmethod
    def _box_is_not_empty(cls, value: Box | None) -> Box | None:
        if value is not None and not (value[0] < value[2] and value[1] < value[3]):
            raise PydanticCustomError("box", "an empty box")
        return value


def columns(ratios: str, prompts: Sequence[str]) -> list[Region]:
    """Return regions side by side, from the left, as A1111's regional prompter has them with "Columns".

    Args:
        ratios: Widths such as "1,2,1". Of several rows, "1,1,2;3,1,1": for each its height, then the widths in it.
        prompts: The prompt of each region, row by row.

    Raises:
        RequestError: If the ratios are no positive numbers, or there are more or fewer prompts than regions.
    """
    boxes = list(_boxes("columns", ratios))
    return [Region(prompt=prompt, box=box) for prompt, box in _pairs("columns", ratios, prompts, boxes)]


def rows(ratios: str, prompts: Sequence[str]) -> list[Region]:
    """Return regions one below the other, from the top: as `columns`, with width and height exchanged."""
    boxes = [(top, left, bottom, right) for left, top, right, bottom in _boxes("rows", ratios)]
    return [Region(prompt=prompt, box=box) for prompt, box in _pairs("rows", ratios, prompts, boxes)]


def _boxes(name: str, ratios: str) -> Iterator[Box]:
    """Yield the boxes of columns."""
    try:
        lines = [[float(number) for number in line.split(",")] for line in ratios.split(";")]
    except ValueError:
        lines = [[]]
    if not all(lines) or not all(number > 0.0 and math.isfinite(number) for line in lines for number in line):
        raise RequestError(f"{name} is {ratios[:60]!r}; it must be numbers above 0, such as 1,2,1, or 1,1,2;3,1,1")
    heights = [line[0] for line in lines] if len(lines) > 1 else [1.0]
    widths = [line[1:] or [1.0] for line in lines] if len(lines) > 1 else lines
    for (top, bottom), line in zip(_spans(heights), widths, strict=True):
        for left, right in _spans(line):
            yield left, top, right, bottom


def _spans(ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Return (begin, end) of each part of 0 to 1, by the ratios."""
    ends = [0.0, *(end / sum(ratios) for end in accumulate(ratios))]
    return list(pairwise([*ends[:-1], 1.0]))


def _pairs(name: str, ratios: str, prompts: Sequence[str], boxes: Sequence[Box]) -> Iterator[tuple[str, Box]]:
    if len(prompts) != len(boxes):
        raise RequestError(f"{name} {ratios[:60]!r} makes {len(boxes)} regions, and {len(prompts)} prompts are given")
    return zip(prompts, boxes, strict=True)
