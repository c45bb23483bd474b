"""A picture in the terminal: the graphics protocols of kitty and iTerm2, sixel, or cells of two coloured halves."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CELLS = 40  # width of a picture of cells
PIXELS = 512  # the longer side of a picture in pixels
CHUNK = 4096  # bytes of base64 in one escape sequence of kitty's protocol


def protocol_of(environ: Mapping[str, str]) -> str | None:
    """Return how the terminal shows pictures: "kitty", "iterm2", "sixel", "cells", or None."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if term in ("", "dumb"):
        return None
    if not term.startswith(("screen", "tmux")):  # which pass no pictures on
        if "kitty" in term or "ghostty" in term or program == "ghostty" or "KITTY_WINDOW_ID" in environ:
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty"):
            return "iterm2"
        if "sixel" in term or term.startswith(("foot", "mlterm", "yaft")):
            return "sixel"
    return None if environ.get("NO_COLOR") else "cells"


def sequences(image: Image.Image, protocol: str, *, columns: int = 80, true_color: bool = True) -> str:
    """Return the escape sequences that show a picture.

    Args:
        image: The picture.
        protocol: As `protocol_of` returns it.
        columns: Width of the terminal.
        true_color: Whether cells may have any colour, rather than one of 256.
    """
    image = image.convert("RGB")
    if protocol == "cells":
        return _cells(image, min(CELLS, columns), true_color)
    image.thumbnail((PIXELS, PIXELS))
    if protocol == "sixel":
        return _sixel(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # without what the picture's file carries
    data = base64.b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={buffer.tell()};preserveAspectRatio=1:{data}\x07"
    chunks = [data[k : k + CHUNK] for k in range(0, len(data), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    return "".join(
        f"\x1b_G{head}m={int(k < len(chunks) - 1)};{chunk}\x1b\\"
        for k, (head, chunk) in enumerate(zip(heads, chunks, strict=True))
    )


def _cells(image: Image.Image, width: int, true_color: bool) -> str:
    """Return lines of upper half blocks, whose foreground is one row of pixels and whose background the next."""
    height = max(2, round(width * image.height / image.width / 2) * 2)
    small = image.resize((width, height))
    pixels = small.tobytes()
    colors = [tuple(pixels[k : k + 3]) for k in range(0, len(pixels), 3)]

    def paint(ground: int, rgb: tuple[int, ...]) -> str:
        if true_color:
            return f"{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}"
        r, g, b = (round(value / 51) for value in rgb)
        return f"{ground};5;{16 + 36 * r + 6 * g + b}"  # xterm's cube of 6x6x6 colours

    lines = []
    for y in range(0, height, 2):
        pairs = zip(colors[y * width : (y + 1) * width], colors[(y + 1) * width : (y + 2) * width], strict=True)
        lines.append("".join(f"\x1b[{paint(38, top)};{paint(48, bottom)}m▀" for top, bottom in pairs) + "\x1b[0m")
    return "\n".join(lines)


def _sixel(image: Image.Image) -> str:
    """Return a picture as sixels: bands of six rows, each drawn colour by colour."""
    indexed = image.quantize(256)
    palette = indexed.getpalette() or []
    width, height, data = *indexed.size, indexed.tobytes()
    text = f'\x1bPq"1;1;{width};{height}'
    for color in range(len(palette) // 3):
        r, g, b = (round(value * 100 / 255) for value in palette[3 * color : 3 * color + 3])
        text += f"#{color};2;{r};{g};{b}"
    bands = []
    for top in range(0, height, 6):
        rows = [data[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        bands.append("$".join(f"#{color}{''.join(_band(rows, color))}" for color in sorted(set(b"".join(rows)))))
    return f"{text}{'-'.join(bands)}\x1b\\"


def _band(rows: list[bytes], color: int) -> Iterator[str]:
    """Yield the run-length encoded sixels of one colour in a band of rows."""
    sixels = (
        63 + sum((pixel == color) << bit for bit, pixel in enumerate(column)) for column in zip(*rows, strict=True)
    )
    for sixel, run in groupby(sixels):
        yield f"!{len(list(run))}{chr(sixel)}"
