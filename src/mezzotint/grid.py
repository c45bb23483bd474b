"""Grids: one request drawn with every combination of up to three fields' values, on one labelled sheet.

    plan = planned(pipe, request, x="steps=10,20,30", y="sampler=euler,dpmpp_2m", z="seed=1,2")
    for cell in plan.cells: ...          # or draw(pipe, plan, folder), which keeps each finished cell
    sheet(plan, images) -> one picture

x runs to the right, y downwards, each value of z is a grid of its own below the last. A cell is kept in a file whose
name is a hash of its request and of the model, so a grid that grows by a value draws only what is new.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from mezzotint import rows
from mezzotint.errors import RequestError
from mezzotint.images.io import save_png
from mezzotint.request import Request

if TYPE_CHECKING:
    from mezzotint.pipeline import Pipeline

MAX_CELLS = 1000
MAX_PIXELS = 100_000_000  # of the sheet: 300 MB in memory
GAP, LABEL, TITLE = 6, 16, 18  # pixels: between cells, and sizes of letters
MAX_LINES = 6  # of a label
PAPER, INK = "white", (25, 25, 28)

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Axis:
    """A field and its values in order, as text for the labels and as a Request takes them.

    field "prompt" searches and replaces, as A1111's "Prompt S/R": each value stands in for the first one, in the prompt
    and the negative prompt.
    """

    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Axis:
        """From "steps=10,20,30". A value with a comma is in double quotes, a list is as in JSON. Raises RequestError.

        name: "x", "y" or "z", for what an error says.
        """
        field, mark, listed = text.partition("=")
        field = field.strip()
        if not mark or not field:
            raise RequestError(f"{name} is {text[:60]!r}; it must be FIELD=VALUE,VALUE,..., such as steps=10,20,30")
        if field == "count":
            raise RequestError(f"{name} is count, which cannot be an axis: a cell is one picture; take seed")
        values = _values(field, listed)
        if not all(value != "" for value in values):
            raise RequestError(f"{name} is {text[:60]!r}; a value of {field} is empty")
        texts = tuple(value if isinstance(value, str) else json.dumps(value) for value in values)
        if len(set(texts)) < len(texts):
            raise RequestError(f"{name} is {text[:60]!r}; a value of {field} is there twice")
        return cls(field, texts, tuple(values))

    def apply(self, request: Request, k: int) -> Request:
        """The request with value k."""
        value = self.values[k]
        if self.field != "prompt":
            return request.replace(**{self.field: value})
        search = str(self.values[0])
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        if not any(search in (text or "") for text in texts.values()):
            raise RequestError(
                f"the axis prompt begins with {search[:60]!r}, which is not in the prompt; the first value is what the "
                "others replace"
            )
        return request.replace(**{name: text and text.replace(search, str(value)) for name, text in texts.items()})


@dataclass(frozen=True)
class GridPlan:
    """axes: of x, y and z those that were given, None for the others. cells: resolved requests, z by y by x."""

    axes: tuple[Axis | None, Axis | None, Axis | None]
    cells: list[Request]

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many values x, y and z have."""
        x, y, z = (len(axis.values) if axis else 1 for axis in self.axes)
        return x, y, z


def planned(pipe: Pipeline, request: Request, x: str, y: str | None = None, z: str | None = None) -> GridPlan:
    """The cells of a grid, checked before the first is drawn. A request with no seed gets 0, the same in every cell.

    Raises RequestError for an axis that is none, a value that its field cannot take, and a grid that is too large.
    """
    axes = parse(x, y, z)
    request = request.replace(count=1, seed=request.seed or 0)
    cells = []
    counts = [range(len(axis.values)) if axis else range(1) for axis in axes]
    for k, j, i in product(*reversed(counts)):
        cell = request
        for axis, n in zip(axes, (i, j, k), strict=True):
            cell = axis.apply(cell, n) if axis else cell
        cells.append(pipe.resolve(cell))
    plan = GridPlan(axes, cells)
    _layout(plan, [(cell.width or 0, cell.height or 0) for cell in cells])  # raises
    return plan


def parse(x: str, y: str | None, z: str | None) -> tuple[Axis | None, Axis | None, Axis | None]:
    """The axes, checked as far as can be done without a model. Raises RequestError."""
    axes = tuple(None if text is None else Axis.parse(name, text) for name, text in (("x", x), ("y", y), ("z", z)))
    given = [axis for axis in axes if axis]
    fields = [axis.field for axis in given]
    if len(set(fields)) < len(fields):
        raise RequestError(f"{max(fields, key=fields.count)} is the field of two axes; it can only be of one")
    cells = 1
    for axis in given:
        cells *= len(axis.values)
        if axis.field != "prompt":
            for value in axis.values:
                Request.model_validate({"prompt": "", axis.field: value})  # raises
    if cells > MAX_CELLS:
        raise RequestError(f"the grid has {cells:,} cells; it may have {MAX_CELLS:,}")
    return axes  # type: ignore[return-value]


def draw(pipe: Pipeline, plan: GridPlan, folder: Path, on_step: OnStep = lambda done, total: None) -> list[Path]:
    """Draws the cells that `folder` does not hold, and returns the files of all of them.

    on_step(done, total) counts the steps of those to be drawn; what it raises ends the work, and no finished cell is
    lost. Raises RequestError.
    """
    depends = json.dumps([pipe.parts.identity, pipe.device.type, str(pipe.dtype)], sort_keys=True)
    paths = []
    for cell in plan.cells:
        asked = cell.model_dump_json(exclude_defaults=True)  # a field that comes later changes no name
        paths.append(folder / f"{hashlib.sha256(f'{depends}{asked}'.encode()).hexdigest()[:16]}.png")
    missing = {path: cell for path, cell in zip(paths, plan.cells, strict=True) if not path.exists()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{str(folder)!r} cannot be made ({error.strerror})") from None
    done, total = 0, sum(cell.steps or 0 for cell in missing.values())
    for path, cell in missing.items():
        before = done

        def step(now: int, _: int, before: int = before) -> None:
            on_step(before + now, max(total, before + now))

        save_png(pipe.generate(cell, on_step=step).images[0], path)
        done += cell.steps or 0
    return paths


# ---- the sheet -------------------------------------------------------------------------------------------------------


def sheet(plan: GridPlan, paths: Sequence[Path]) -> Image.Image:
    """The cells of a plan on white, with the values beside them. Labels have the letters of Pillow's own font.

    Raises RequestError where the pictures turned out larger than their requests and the sheet would be too large.
    """
    sizes = []
    for path in paths:
        with Image.open(path, formats=["PNG"]) as image:
            sizes.append(image.size)
    layout = _layout(plan, sizes)
    whole = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(whole)
    columns, lines, blocks = plan.shape
    for k in range(blocks):
        top = k * layout.block
        if layout.titles:
            draw.multiline_text((layout.left, top + GAP), layout.titles[k], INK, _font(TITLE))
        for i, label in enumerate(layout.columns):
            middle = layout.left + i * (layout.width + GAP) + layout.width // 2
            draw.multiline_text(
                (middle, top + layout.title + layout.head - GAP), label, INK, _font(LABEL), anchor="md", align="center"
            )
        for j in range(lines):
            y = top + layout.title + layout.head + j * (layout.height + GAP)
            if layout.rows:
                place = layout.left - GAP, y + layout.height // 2
                draw.multiline_text(place, layout.rows[j], INK, _font(LABEL), anchor="rm", align="right")
            for i in range(columns):
                with Image.open(paths[(k * lines + j) * columns + i], formats=["PNG"]) as image:
                    whole.paste(image.convert("RGB"), (layout.left + i * (layout.width + GAP), y))
    return whole


@dataclass(frozen=True)
class _Layout:
    """In pixels. A block is one grid, as many as z has values: title, head of labels, then cells of width x height."""

    columns: list[str]  # the labels, lines broken
    rows: list[str]
    titles: list[str]
    left: int  # of the first cell
    title: int  # heights
    head: int
    block: int
    width: int  # of the largest cell
    height: int
    size: tuple[int, int]  # of the sheet


def _layout(plan: GridPlan, sizes: Sequence[tuple[int, int]]) -> _Layout:
    """For pictures of these sizes. Raises RequestError where the sheet would be too large."""
    width, height = (max(side) for side in zip(*sizes, strict=True))
    columns, lines, blocks = plan.shape
    x, y, z = plan.axes
    font = _font(LABEL)
    heads = [_wrap(label, font, width) for label in _labels(x)]
    sides = [_wrap(label, font, max(width, 120)) for label in _labels(y)]
    left = GAP + (round(max(font.getlength(line) for side in sides for line in side.split("\n"))) + GAP if y else 0)
    across = left + columns * (width + GAP)
    titles = [_wrap(label, _font(TITLE), across - left) for label in _labels(z)]
    head = _height(heads, LABEL) + GAP
    title = _height(titles, TITLE) + 2 * GAP if z else 0
    block = title + head + lines * (height + GAP)
    size = across, blocks * block + GAP
    if math.prod(size) > MAX_PIXELS:
        right = f"it may have {MAX_PIXELS:,} pixels. Take fewer values, or smaller pictures"
        raise RequestError(f"the grid would be {size[0]}x{size[1]}; {right}")
    return _Layout(heads, sides, titles, left, title, head, block, width, height, size)


def _labels(axis: Axis | None) -> list[str]:
    """What stands beside the cells: "steps 20", or of a prompt the words alone."""
    if axis is None:
        return []
    return [text if axis.field == "prompt" else f"{axis.field} {text}" for text in axis.texts]


def _height(labels: Sequence[str], size: int) -> int:
    return max((label.count("\n") + 1 for label in labels), default=0) * (size + 4) + GAP


def _wrap(text: str, font: Any, width: int) -> str:
    """At most MAX_LINES lines no wider than `width` pixels; a word that is wider is cut where it has to be."""
    lines = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."])


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _values(field: str, listed: str) -> list[Any]:
    """The values of an axis: JSON ("10,20", "[0.3,5],[1,4]") or else texts with commas between, as in a CSV file."""
    if field not in rows.TEXTS:
        try:
            values: list[Any] = json.loads(f"[{listed}]")
            return values or [""]
        except (ValueError, RecursionError):
            pass
    try:
        (cells,) = csv.reader([listed], skipinitialspace=True)
    except (ValueError, csv.Error):
        return [""]
    return [cell.strip() for cell in cells]
