"""Outlines: scenes of one object of any size anywhere on the canvas, with its outline; the data of the ControlNet.

Scene i is a function of (seed, i) and the split alone. Captions name neither size nor place. The outline is a white
line on black, LINE pixels wide, along the inner edge of the object's silhouette, whose holes are filled.

    python recipes/emoji/outlines.py build/outlines --count 12000     # a folder for `mezzotint train controlnet`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFont
from scipy import ndimage  # type: ignore[import-untyped]

from scenes import CELL, FONT, FONT_SIZE, SIDE, build_grounds, draw_glyph, over, to_images
from words import (
    BACKGROUNDS,
    CORE_NAMES,
    GROUND_SHARES,
    GROUNDS,
    MORE_NAMES,
    OBJECTS,
    Spec,
    caption,
    choose,
    is_held_out,
    pick,
)

LINE = 2  # pixels
SIZES = tuple(range(40, 121, CELL))  # longer side of a glyph, in pixels; on the grid of latents, as in scenes.py
CORE_SHARE = 0.75
TRAINING_SEED, HELD_OUT_SEED = 5005, 6006


@dataclass(frozen=True)
class Outlined:
    """A scene: its words, and the object's side and top left corner (x, y) in pixels."""

    name: str
    background: str
    side: int
    corner: tuple[int, int]
    caption: str


class Outlines:
    """An endless, indexed collection of scenes with outlines; see the module's docstring.

    Held-out ones show core objects on backgrounds of one colour, in combinations that the model never saw.
    """

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.seed, self.held_out = seed, held_out
        self._glyphs: dict[tuple[str, int], np.ndarray] = {}
        self._grounds = build_grounds()

    def scene(self, index: int) -> Outlined:
        """Draw the words and the place of scene `index`."""
        random = Random((self.seed << 40) + index)
        core = self.held_out or random.random() < CORE_SHARE
        while True:
            name = choose(CORE_NAMES if core else MORE_NAMES, random)
            colour = choose(tuple(BACKGROUNDS), random)
            pattern = "colour" if self.held_out else pick(GROUND_SHARES, random.random())
            ground = {"colour": colour, "stripes": f"{colour} stripes", "gradient": f"{colour} gradient"}.get(
                pattern, pattern
            )
            if is_held_out(name, "on", ground) == self.held_out:
                break
        side = choose(SIZES, random)
        cells = (SIDE - side) // CELL + 1
        corner = (CELL * int(cells * random.random()), CELL * int(cells * random.random()))
        spec = Spec("single", (name,), ground, (side,), (corner,))
        return Outlined(name, ground, side, corner, caption(spec, random, name_background=self.held_out))

    @cached_property
    def _face(self) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(FONT), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)

    def glyph(self, name: str, side: int) -> np.ndarray:
        """Return an object (side, side, 4), premultiplied RGBA."""
        if (name, side) not in self._glyphs:
            glyph = draw_glyph(OBJECTS[name], self._face).convert("RGBa")
            small = np.array(glyph.resize((side, side), Image.Resampling.LANCZOS))
            small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
            self._glyphs[name, side] = small
        return self._glyphs[name, side]

    def compose(self, scenes: Sequence[Outlined]) -> tuple[torch.Tensor, np.ndarray]:
        """Return pixels (B, 3, 128, 128) in [-1, 1] and silhouettes (B, 128, 128), boolean."""
        canvas = self._grounds[[GROUNDS.index(scene.background) for scene in scenes]].float()
        silhouettes = np.zeros((len(scenes), SIDE, SIDE), dtype=bool)
        for k, scene in enumerate(scenes):
            (x, y), glyph = scene.corner, self.glyph(scene.name, scene.side)
            window = slice(y, y + scene.side), slice(x, x + scene.side)
            canvas[k][window] = over(torch.from_numpy(glyph)[None].float(), canvas[k][window][None])[0]
            silhouettes[k][window] = glyph[..., 3] > 127
            silhouettes[k] = ndimage.binary_fill_holes(silhouettes[k])
        return (canvas / 127.5 - 1).permute(0, 3, 1, 2).contiguous(), silhouettes


def outline(silhouette: np.ndarray) -> np.ndarray:
    """Return the line (H, W) along the inner edge of a silhouette; filling its holes gives the silhouette back."""
    eroded = ndimage.binary_erosion(silhouette, np.ones((3, 3)), iterations=LINE)  # beyond the canvas is outside
    line: np.ndarray = silhouette & ~eroded
    return line


def outline_image(silhouette: np.ndarray) -> Image.Image:
    """Return the outline of a silhouette as a picture, white on black."""
    return Image.fromarray(outline(silhouette).astype(np.uint8) * 255).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scenes and their outlines for `mezzotint train controlnet`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--first", type=int, default=0, help="index of the first scene")
    parser.add_argument("--held-out", action="store_true", help="scenes of the other split, for validation")
    options = parser.parse_args()
    outlines = Outlines(HELD_OUT_SEED if options.held_out else TRAINING_SEED, options.held_out)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index in range(options.first, options.first + options.count):
            scene = outlines.scene(index)
            pixels, silhouettes = outlines.compose([scene])
            name, edge = f"{index:06}.png", f"{index:06}-outline.png"
            to_images(pixels)[0].save(options.folder / name)
            outline_image(silhouettes[0]).save(options.folder / edge)
            line = {"file_name": name, "conditioning_image": edge, "text": scene.caption}
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
