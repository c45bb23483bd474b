"""X/Y/Z grids: one request, generated with every combination of up to three fields' values, on one labelled sheet.

    plan = plan_grid(pipe, request, x="steps=10,20,30", y="sampler=euler,dpmpp_2m", z="seed=1,2")
    paths = draw(pipe, plan, folder)     # one picture for each of plan.cells
    image = sheet(plan, paths)

x runs to the right and y downwards; each value of z is a separate grid below the previous one. The file name of a cell
is a hash of its request and of the model, so adding a value to a grid generates only the new cells.
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
MAX_PIXELS = 100_000_000  # of the sheet; 300 MB in memory
GAP, LABEL, TITLE = 6, 16, 18  # pixels: the gap between cells, and font sizes
MAX_LINES = 6  # per label
PAPER, INK = "white", (25, 25, 28)

OnStep = Callable[[int, int], None]
OnNotice = Callable[[str], None]


@dataclass(frozen=True)
class Axis:
    """A field of Request and its values.

    The field "prompt" is search and replace, like A1111's "Prompt S/R": each value replaces the first one in the prompt
    and the negative prompt.

    Attributes:
        field: The name of the field.
        texts: The values as text, for the labels.
        values: The values as a Request takes them.
    """

    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Axis:
        """Parse an axis such as "steps=10,20,30".

        Args:
            name: "x", "y" or "z", for error messages.
            text: The field and its values. A value with a comma is in double quotes; a list is written as in JSON.

        Raises:
            RequestError: If the text has another form, or a value is empty or occurs twice.
        """
        field, mark, listed = text.partition("=")
        field = field.strip()
        if not mark or not field:
            raise RequestError(f"{name} is {text[:60]!r}; it must be FIELD=VALUE,VALUE,..., such as steps=10,20,30")
        if field == "count":
            raise RequestError(f"{name} is count, which cannot be an axis; use seed, since a cell is one picture")
        values = _parse_values(field, listed)
        if not all(value != "" for value in values):
            raise RequestError(f"{name} is {text[:60]!r}; a value of {field} is empty")
        texts = tuple(value if isinstance(value, str) else json.dumps(value) for value in values)
        if len(set(texts)) < len(texts):
            raise RequestError(f"{name} is {text[:60]!r}; a value of {field} occurs twice")
        return cls(field, texts, tuple(values))

    def apply(self, request: Request, k: int) -> Request:
        """Return the request with value k."""
        value = self.values[k]
        if self.field != "prompt":
            return request.replace(**{self.field: value})
        search = str(self.values[0])
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        if not any(search in (text or "") for text in texts.values()):
            raise RequestError(
                f"the axis prompt begins with {search[:60]!r}, which is not in the prompt; the first value must be the "
                "text that the others replace"
            )
        return request.replace(**{name: text and text.replace(search, str(value)) for name, text in texts.items()})


@dataclass(frozen=True)
class GridPlan:
    """The cells of a grid.

    Attributes:
        axes: The axes x, y and z; y and z may be None.
        cells: Resolved requests, ordered by z, then y, then x.
    """

    axes: tuple[Axis | None, Axis | None, Axis | None]
    cells: list[Request]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the number of values of x, y and z."""
        x, y, z = (len(axis.values) if axis else 1 for axis in self.axes)
        return x, y, z


def plan_grid(pipe: Pipeline, request: Request, x: str, y: str | None = None, z: str | None = None) -> GridPlan:
    """Make and validate the cells of a grid. A request without a seed gets seed 0 in every cell.

    Args:
        pipe: The pipeline, which resolves the requests.
        request: The request that the axes vary.
        x: The axis to the right, such as "steps=10,20,30".
        y: The axis downwards.
        z: The axis of separate grids.

    Raises:
        RequestError: If an axis or a value is invalid, or the grid is too large.
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
    """Parse the axes and validate their values as far as possible without a model.

    Raises:
        RequestError: If an axis or a value is invalid, or there are too many cells.
    """
    axes = tuple(None if text is None else Axis.parse(name, text) for name, text in (("x", x), ("y", y), ("z", z)))
    given = [axis for axis in axes if axis]
    fields = [axis.field for axis in given]
    if len(set(fields)) < len(fields):
        raise RequestError(f"{max(fields, key=fields.count)} is the field of two axes; give each axis its own field")
    cells = 1
    for axis in given:
        cells *= len(axis.values)
        if axis.field != "prompt":
            for value in axis.values:
                Request.model_validate({"prompt": "", axis.field: value})  # raises
    if cells > MAX_CELLS:
        raise RequestError(f"the grid has {cells:,} cells; it must have at most {MAX_CELLS:,}")
    return axes  # type: ignore[return-value]


def draw(
    pipe: Pipeline,
    plan: GridPlan,
    folder: Path,
    on_step: OnStep = lambda done, total: None,
    on_notice: OnNotice = lambda sentence: None,
) -> list[Path]:
    """Generate the cells that are not in the folder yet.

    Args:
        pipe: The pipeline.
        plan: The grid.
        folder: The folder of the cells' pictures.
        on_step: Called with (steps done, steps in total) of the missing cells. An exception that it raises ends the
            work; finished cells are kept.
        on_notice: Called with each of the cells' `Result.notices`, once.

    Returns:
        The files of all cells, in the plan's order.

    Raises:
        RequestError: If the folder or a file cannot be written.
    """
    dependencies = json.dumps([pipe.parts.identity, pipe.device.type, str(pipe.dtype)], sort_keys=True)
    paths = []
    for cell in plan.cells:
        fields = cell.model_dump_json(exclude_defaults=True)  # so that a new field of Request changes no name
        paths.append(folder / f"{hashlib.sha256(f'{dependencies}{fields}'.encode()).hexdigest()[:16]}.png")
    missing = {path: cell for path, cell in zip(paths, plan.cells, strict=True) if not path.exists()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{str(folder)!r} cannot be created ({error.strerror})") from None
    done, total = 0, sum(cell.steps or 0 for cell in missing.values())
    told: set[str] = set()
    for path, cell in missing.items():
        before = done

        def step(now: int, _: int, before: int = before) -> None:
            on_step(before + now, max(total, before + now))

        result = pipe.generate(cell, on_step=step)
        save_png(result.images[0], path)
        for notice in result.notices:
            if notice not in told:
                told.add(notice)
                on_notice(notice)
        done += cell.steps or 0
    return paths


# ---- the sheet -------------------------------------------------------------------------------------------------------


def sheet(plan: GridPlan, paths: Sequence[Path]) -> Image.Image:
    """Compose the cells' pictures and their labels, in Pillow's own font, on a white sheet.

    Args:
        plan: The grid.
        paths: The pictures of its cells.

    Raises:
        RequestError: If the sheet would be too large, since pictures are larger than their requests (as with hires).
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
    """The layout of a sheet in pixels. A block is the grid of one value of z: title, column labels, then the cells."""

    columns: list[str]  # labels, wrapped to lines
    rows: list[str]
    titles: list[str]
    left: int  # of the first cell
    title: int  # height of the title
    head: int  # height of the column labels
    block: int  # height of a block
    width: int  # of the largest cell
    height: int
    size: tuple[int, int]  # of the sheet


def _layout(plan: GridPlan, sizes: Sequence[tuple[int, int]]) -> _Layout:
    """Lay out pictures of these sizes. Raises RequestError if the sheet would be too large."""
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
        right = f"it must have at most {MAX_PIXELS:,} pixels, so use fewer values or smaller pictures"
        raise RequestError(f"the sheet would be {size[0]}x{size[1]}; {right}")
    return _Layout(heads, sides, titles, left, title, head, block, width, height, size)


def _labels(axis: Axis | None) -> list[str]:
    """Return an axis's labels: "steps 20", or the replaced text alone for a prompt."""
    if axis is None:
        return []
    return [text if axis.field == "prompt" else f"{axis.field} {text}" for text in axis.texts]


def _height(labels: Sequence[str], size: int) -> int:
    """Return the height of the tallest label at a font size."""
    return max((label.count("\n") + 1 for label in labels), default=0) * (size + 4) + GAP


def _wrap(text: str, font: Any, width: int) -> str:
    """Wrap a text to at most MAX_LINES lines of at most `width` pixels; a longer word is broken."""
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


def _parse_values(field: str, text: str) -> list[Any]:
    """Parse the values of an axis as JSON ("10,20", "[0.3,5],[1,4]") or, failing that, as a row of CSV."""
    if field not in rows.TEXT_FIELDS:
        try:
            values: list[Any] = json.loads(f"[{text}]")
            return values or [""]
        except (ValueError, RecursionError):
            pass
    try:
        (cells,) = csv.reader([text], skipinitialspace=True)
    except (ValueError, csv.Error):
        return [""]
    return [cell.strip() for cell in cells]
