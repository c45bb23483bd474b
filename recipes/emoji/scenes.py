"""Scenes: captioned 128x128 pictures of one to three emoji on a background, composed on the fly.

Scene i is a function of (seed, i) and the split alone: never of the batch that it is drawn in, nor of the device.
Pixels are (B, 3, 128, 128) float32 in [-1, 1]. What a scene may show, and how a caption says it, is in words.py.

    python recipes/emoji/scenes.py --sheet sheet.png [--held-out]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from words import (
    BACKGROUNDS,
    CORE_NAMES,
    GROUND_SHARES,
    GROUNDS,
    MORE_NAMES,
    NAMES,
    NO_ARTICLE,
    NUMBERS,
    OBJECTS,
    RECOLOURS,
    RELATIONS,
    SIZE_WORDS,
    Spec,
    caption,
    choose,
    combinations,
    is_held_out,
    pick,
)

SIDE = 128
CELL = 8  # pixels of one latent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size at which the font's bitmaps exist
SMALL, PAIR, PLAIN, LARGE = SIZES = (40, 56, 88, 112)  # longer side of a glyph, in pixels

SHARES = {"single": 0.40, "sized": 0.08, "recoloured": 0.10, "pair": 0.34, "counted": 0.08}
CORE_SHARE = 0.7  # of scenes, that show objects of the core set only
PROMPT_KINDS = ("single", "pair", "single", "recoloured", "single", "pair", "counted", "single", "pair", "recoloured")


# ---- the glyphs ----------------------------------------------------------------------------------------------------


def draw_glyph(emoji: str, face: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw one emoji, cropped to its visible box and padded to a square; RGBA, straight alpha."""
    image = Image.new("RGBA", (3 * FONT_SIZE, 2 * FONT_SIZE))
    # The variation selector asks for colour, which this font always is; it would be drawn as a box.
    ImageDraw.Draw(image).text((20, 20), emoji.replace("\ufe0f", ""), font=face, embedded_color=True)
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font {FONT.name} draws nothing for {emoji!r}; replace it in the list by another emoji")
    glyph = image.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


def build_atlas(objects: Mapping[str, str] = OBJECTS, font: Path = FONT) -> dict[int, torch.Tensor]:
    """Return all objects at each size: (len(objects), size, size, 4) uint8, premultiplied RGBA."""
    if not font.is_file():
        raise FileNotFoundError(
            f"the emoji font is not at {font}; install it (Debian, Ubuntu: apt install fonts-noto-color-emoji)"
        )
    face = ImageFont.truetype(str(font), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)  # joins sequences
    atlas = {size: np.zeros((len(objects), size, size, 4), dtype=np.uint8) for size in SIZES}
    for n, emoji in enumerate(objects.values()):
        glyph = draw_glyph(emoji, face).convert("RGBa")  # premultiplied, so that no dark rim appears when resized
        for size, glyphs in atlas.items():
            small = np.array(glyph.resize((size, size), Image.Resampling.LANCZOS))
            small[..., :3] = np.minimum(small[..., :3], small[..., 3:])  # Lanczos overshoots
            glyphs[n] = small
    return {size: torch.from_numpy(glyphs) for size, glyphs in atlas.items()}


def build_grounds() -> torch.Tensor:
    """Return all backgrounds of GROUNDS: (len(GROUNDS), 128, 128, 3) uint8."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pictures = []
    for name in GROUNDS:
        colour = np.array(BACKGROUNDS.get(name.split()[0], (0, 0, 0)), dtype=float)
        partner = colour * 0.8 if name.startswith("white") else colour * 0.5 + 127.5  # darker or lighter
        if name == "night sky":
            picture = np.array([8, 12, 50]) + (rows / SIDE)[..., None] * np.array([22, 28, 80])
            stars = Random(7)
            for _ in range(26):
                x, y = (int(stars.random() * (SIDE - 2)) for _ in range(2))
                picture[y : y + 2, x : x + 2] = (255, 250, 205)
        elif name == "grass":
            height = 72 + 6 * np.abs(columns % 8 - 4) / 4  # blades
            picture = np.where((rows >= height)[..., None], (70, 160, 60), (165, 215, 250))
        elif name.endswith("stripes"):
            picture = np.where((columns // 16 % 2 == 0)[..., None], colour, partner)
        elif name.endswith("gradient"):
            picture = partner + (rows / (SIDE - 1))[..., None] * (colour - partner)
        else:
            picture = np.broadcast_to(colour, (SIDE, SIDE, 3))
        pictures.append(np.rint(picture).astype(np.uint8))
    return torch.from_numpy(np.stack(pictures))


def over(glyphs: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    """Composite premultiplied glyphs (B, h, w, 4) over opaque colours (B, h, w, 3), 0..255 (Porter and Duff 1984)."""
    return under * (1 - glyphs[..., 3:] / 255) + glyphs[..., :3]


def recolour(glyphs: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Repaint glyphs in one hue, keeping light and shade. Premultiplied (B, H, W, 4) and colours (B, 3), in 0..255.

    The glyph's mean luminance becomes the colour; darker parts go towards black, lighter ones towards white.
    """
    rgb, alpha = glyphs[..., :3], glyphs[..., 3:] / 255
    luminance = (rgb @ rgb.new_tensor([0.299, 0.587, 0.114]))[..., None] / 255  # premultiplied
    middle = luminance.sum((1, 2, 3), keepdim=True) / alpha.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
    middle = middle.clamp(0.15, 0.85)
    tone = luminance / alpha.clamp(min=1e-6)
    dark = (tone / middle).clamp(max=1)
    light = ((tone - middle) / (1 - middle)).clamp(0, 1) * 0.75  # 0.75: the lightest part keeps some of the hue
    colours = colours[:, None, None]
    painted = colours * dark.clamp(min=0.15) * (1 - light) + 255 * light
    return torch.cat([painted * alpha, glyphs[..., 3:]], -1)


# ---- scenes --------------------------------------------------------------------------------------------------------


def layout(
    relation: str | None, size_word: str | None, number: str | None, random: Random
) -> list[tuple[int, tuple[int, int]]]:
    """(size, (x, y) of the top left), in pixels, of each object; all on the grid of latents, none cut, none covered.

    Along a pair's line the objects keep to their halves; across it both share one offset, so that it tells nothing.
    """

    def cells(low: int) -> int:
        return CELL * (low + int(2 * random.random()))

    if relation == "inside":
        return [(SMALL, (cells(5), cells(5))), (LARGE, (CELL, CELL))]
    if number == "three":
        shift, across = cells(0), cells(5)
        return [(SMALL, (shift + SMALL * k, across)) for k in range(3)]
    if relation or number:
        near, far, across = cells(0), cells(8), cells(4)
        if relation in ("right of", "below"):
            near, far = far, near
        stacked = relation in ("above", "below")
        return [(PAIR, (across, along) if stacked else (along, across)) for along in (near, far)]
    if size_word == "large":
        return [(LARGE, (CELL, CELL))]
    size, low = (SMALL, 5) if size_word else (PLAIN, 2)
    return [(size, (cells(low), cells(low)))]


class Scenes:
    """An endless, indexed collection of scenes; see the module's docstring.

    `shares` is the mixture of kinds, `core_share` that of scenes of core objects only. The atlas is built from the font
    when the first picture is composed, unless given.
    """

    def __init__(
        self,
        seed: int,
        device: str | torch.device = "cpu",
        held_out: bool = False,
        *,
        shares: Mapping[str, float] = SHARES,
        core_share: float = CORE_SHARE,
        atlas: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self.seed, self.device, self.held_out = seed, torch.device(device), held_out
        self.shares, self.core_share = tuple(shares.items()), core_share
        self._atlas = {size: glyphs.to(self.device) for size, glyphs in atlas.items()} if atlas else None
        self._grounds = build_grounds().to(self.device)

    def specs(self, indices: Sequence[int]) -> tuple[list[str], list[Spec]]:
        """Return captions and specs of these scenes; needs no font."""
        captions, specs = [], []
        for index in indices:
            random = Random((self.seed << 40) + index)
            specs.append(self._spec(random))
            captions.append(caption(specs[-1], random, name_background=self.held_out))
        return captions, specs

    def _spec(self, random: Random) -> Spec:
        """One scene of the split: drawn again until none of its combinations is held out, or just the kind's own."""
        kind = pick(self.shares, random.random())
        core = random.random() < self.core_share
        while True:
            spec = self._draw(kind, core, random)
            *others, own = (is_held_out(*words) for words in combinations(spec))
            if own == self.held_out and not any(others):
                return spec

    def _draw(self, kind: str, core: bool, random: Random) -> Spec:
        """Draw a random scene of a kind, of either split."""
        name = choose(CORE_NAMES if core or kind == "counted" else MORE_NAMES, random)
        colour, pattern = choose(tuple(BACKGROUNDS), random), pick(GROUND_SHARES, random.random())
        ground = {"colour": colour, "stripes": f"{colour} stripes", "gradient": f"{colour} gradient"}.get(
            pattern, pattern
        )
        objects: tuple[str, ...] = (name,)
        relation = tint = word = number = None
        if kind == "pair":
            relation = pick([(name, share) for name, (share, _) in RELATIONS.items()], random.random())
            second = name
            while second == name:
                second = choose(CORE_NAMES if core else NAMES, random)
            objects = (name, second) if random.random() < 0.5 else (second, name)
        elif kind == "counted":
            while name in NO_ARTICLE:
                name = choose(CORE_NAMES, random)
            number = choose(tuple(NUMBERS), random)
            objects = (name,) * NUMBERS[number]
        elif kind == "recoloured":
            tint = choose([tint for tint in RECOLOURS if tint != colour], random)  # never the background's own
        elif kind == "sized":
            word = choose(SIZE_WORDS, random)
        sizes, corners = zip(*layout(relation, word, number, random), strict=True)
        return Spec(kind, objects, ground, sizes, corners, relation, tint, word, number)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[str], list[Spec]]:
        """Return pixels (B, 3, 128, 128) float32 in [-1, 1], captions and specs."""
        captions, specs = self.specs(indices)
        return self.compose(specs), captions, specs

    def compose(self, specs: Sequence[Spec]) -> torch.Tensor:
        """Render specs to pixels (B, 3, 128, 128), float32 in [-1, 1], on the device."""
        canvas = self._grounds[[GROUNDS.index(spec.background) for spec in specs]].float()  # (B, H, W, 3) in 0..255
        for layer in reversed(range(max(len(spec.objects) for spec in specs))):  # the first object is on top
            for size in SIZES:
                rows = [b for b, spec in enumerate(specs) if spec.sizes[layer : layer + 1] == (size,)]
                if rows:
                    self._paste(canvas, specs, rows, layer, size)
        return (canvas / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def _paste(self, canvas: torch.Tensor, specs: Sequence[Spec], rows: list[int], layer: int, size: int) -> None:
        """Paste one object of each of these rows' specs, all of one size, onto the canvas (B, H, W, 3)."""
        if self._atlas is None:
            self._atlas = {size: glyphs.to(self.device) for size, glyphs in build_atlas().items()}
        table = [(b, NAMES.index(specs[b].objects[layer]), *specs[b].corners[layer]) for b in rows]
        row, number, x, y = torch.tensor(table, device=self.device).T[..., None, None]  # (n, 1, 1) each
        glyphs = self._atlas[size][number[:, 0, 0]].float()
        tints = [(k, RECOLOURS[tint]) for k, b in enumerate(rows) if (tint := specs[b].recolour)]
        if tints:
            where = torch.tensor([k for k, _ in tints], device=self.device)
            colours = torch.tensor([colour for _, colour in tints], dtype=torch.float32, device=self.device)
            glyphs[where] = recolour(glyphs[where], colours)
        axis = torch.arange(size, device=self.device)
        window = (row, y + axis[:, None], x + axis)
        canvas[window] = over(glyphs, canvas[window])

    @classmethod
    def prompts(cls, count: int, seed: int = 0, *, core: bool = True) -> list[tuple[str, Spec]]:
        """Held-out prompts for evaluation, the same for the same arguments: of ten, four single, three pairs, two
        recoloured and one counted; of core objects, or all. They always name their background. No font is needed."""
        share = 1.0 if core else len(CORE_NAMES) / len(NAMES)
        drawn = [cls(seed, held_out=True, shares={kind: 1.0}, core_share=share) for kind in PROMPT_KINDS]
        rows = (drawn[i % len(drawn)].specs([i]) for i in range(count))
        return [(captions[0], specs[0]) for captions, specs in rows]


# ---- looking at them -----------------------------------------------------------------------------------------------


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W) in [-1, 1] to PIL images."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def contact_sheet(images: Sequence[Image.Image], texts: Sequence[str], columns: int) -> Image.Image:
    """Arrange pictures of equal size in rows, each with its wrapped text underneath."""
    width, height, text_height = images[0].width, images[0].height, 38
    cell = (max(width, 160) + 8, height + text_height)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for n, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = n % columns * cell[0], n // columns * cell[1]
        sheet.paste(image, (left + (cell[0] - width) // 2, top + 4))
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) > cell[0] - 6 and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        for k, line in enumerate(lines):
            middle = left + (cell[0] - draw.textlength(line, font)) / 2
            draw.text((middle, top + height + 5 + 12 * k), line, "black", font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of scenes with their captions.")
    parser.add_argument("--sheet", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="show held-out combinations")
    options = parser.parse_args()
    scenes = Scenes(options.seed, held_out=options.held_out)
    pixels, captions, _ = scenes.batch(range(options.count))
    contact_sheet(to_images(pixels), captions, columns=8).save(options.sheet)
    print(f"{options.count} scenes written to {options.sheet}")


if __name__ == "__main__":
    main()
