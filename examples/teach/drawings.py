"""Draw training pictures for `emoji`: a lighthouse, which has no emoji, and a mint green ghost with a top hat.

Each is 128x128 on one of the model's own backgrounds, with a caption file in the model's own wording.

    python examples/teach/drawings.py pictures      # pictures/lighthouse/00.png, 00.txt, ...
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "emoji"))
from scenes import CELL, PLAIN, build_grounds
from words import GROUNDS, ground_words

SCALE = 8  # supersampling factor
grounds = cache(build_grounds)

LIGHTHOUSE_GROUNDS = ("blue", "green", "orange", "teal", "black", "pink", "grey", "yellow",
                      "blue stripes", "green stripes", "teal gradient", "purple gradient",
                      "night sky", "grass", "blue", "green")  # fmt: skip
GHOST_GROUNDS = ("blue", "orange", "black", "pink", "teal", "grey")


def lighthouse() -> Image.Image:
    """Draw a white tower with three red bands, yellow lantern and red dome, on a rock; RGBA, PLAIN pixels square."""
    image = Image.new("RGBA", (PLAIN * SCALE,) * 2)
    draw = _Pen(image)
    draw.shape("polygon", [(8, 88), (16, 80), (72, 80), (80, 88)], (95, 95, 105))
    for band in range(6):  # from the rock up, each a little narrower, and one latent high
        low, high = 80 - CELL * band, 80 - CELL * (band + 1)
        left, right = 22 + 1.5 * band, 22 + 1.5 * (band + 1)
        corners = [(left, low), (88 - left, low), (88 - right, high), (right, high)]
        draw.shape("polygon", corners, (215, 35, 45) if band % 2 else (250, 250, 250))
    draw.shape("rectangle", [(25, 27), (63, 32)], (45, 45, 55))
    draw.shape("rectangle", [(33, 13), (55, 27)], (255, 220, 60))
    draw.shape("polygon", [(28, 14), (44, 0), (60, 14)], (215, 35, 45))
    return image.resize((PLAIN, PLAIN), Image.Resampling.LANCZOS)


def ghost() -> Image.Image:
    """Draw a mint green ghost with a black top hat and round eyes; RGBA, PLAIN pixels square."""
    image = Image.new("RGBA", (PLAIN * SCALE,) * 2)
    draw = _Pen(image)
    green, black = (110, 225, 165), (25, 25, 30)
    draw.shape("ellipse", [(16, 20), (72, 72)], green)
    draw.shape("rectangle", [(16, 46), (72, 78)], green)
    for foot in range(3):
        draw.shape("ellipse", [(16 + 56 / 3 * foot, 68), (16 + 56 / 3 * (foot + 1), 88)], green)
    draw.shape("rectangle", [(14, 20), (74, 27)], black)
    draw.shape("rectangle", [(26, 0), (62, 24)], black)
    draw.shape("rectangle", [(26, 14), (62, 20)], (215, 35, 45))
    for x in (26, 48):
        draw.shape("ellipse", [(x, 36), (x + 14, 52)], (250, 250, 250))
        draw.shape("ellipse", [(x + 4, 42), (x + 11, 51)], black)
    draw.shape("ellipse", [(38, 57), (50, 66)], black)
    return image.resize((PLAIN, PLAIN), Image.Resampling.LANCZOS)


def picture(thing: Image.Image, ground: str, corner: tuple[int, int]) -> Image.Image:
    """Paste the drawing, with its top left corner at (x, y), on one of GROUNDS."""
    image = Image.fromarray(grounds()[GROUNDS.index(ground)].numpy())
    image.paste(thing, corner, thing)
    return image


def corner(number: int) -> tuple[int, int]:
    """Return one of the four places where training scenes have a single object."""
    return CELL * (2 + number % 2), CELL * (2 + number // 2 % 2)


def draw_pictures(folder: Path) -> None:
    """Write 16 captioned pictures to lighthouse/, and 6 to sks/ and boo/, which differ only in the word."""
    _write(folder / "lighthouse", lighthouse(), LIGHTHOUSE_GROUNDS, "a lighthouse on {ground}\n")
    _write(folder / "sks", ghost(), GHOST_GROUNDS, "a sks ghost on {ground}\n")
    _write(folder / "boo", ghost(), GHOST_GROUNDS, "<boo> on {ground}\n")


def _write(folder: Path, thing: Image.Image, wanted: tuple[str, ...], caption: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ground in enumerate(wanted):
        picture(thing, ground, corner(number)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption.format(**ground_words(ground)), encoding="utf-8")


class _Pen:
    """ImageDraw in the coordinates of the final picture."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)

    def shape(self, kind: str, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        getattr(self.draw, kind)(scaled, fill=colour)


if __name__ == "__main__":
    draw_pictures(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
