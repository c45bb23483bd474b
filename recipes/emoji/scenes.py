"""Scenes: captioned 128x128 pictures of one or two emoji on a coloured background, composed on the fly.

Scene i is a function of (seed, i) and the split alone: never of the batch that it is drawn in, nor of the device.
Pixels are (B, 3, 128, 128) float32 in [-1, 1]. Positions are (x, y) of a glyph's centre in pixels from the top left.
Combinations that a fixed hash holds out appear in no training scene; `held_out=True` draws only those.

    python recipes/emoji/scenes.py --sheet sheet.png [--held-out]
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")
UInt64s = npt.NDArray[np.uint64]

SIDE = 128
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size at which the font's bitmaps exist
SIZES = (40, 52, 58, 80, 92, 108)  # longer side of a glyph, in pixels
SMALL, PAIR, PLAIN, LARGE = (40,), (52, 58), (80, 92), (108,)

BACKGROUNDS = {
    "red": (205, 32, 44),
    "orange": (255, 140, 26),
    "yellow": (255, 235, 105),
    "green": (56, 142, 60),
    "blue": (40, 90, 215),
    "purple": (120, 50, 160),
    "pink": (255, 150, 190),
    "brown": (110, 68, 38),
    "black": (16, 16, 18),
    "white": (250, 250, 250),
    "grey": (140, 140, 145),
    "teal": (0, 160, 160),
}
RECOLOURS = {
    "red": (225, 40, 50),
    "yellow": (255, 215, 40),
    "green": (50, 165, 60),
    "blue": (40, 100, 230),
    "purple": (140, 60, 190),
    "pink": (255, 120, 180),
}
SPELLINGS = {"grey": ("grey", "gray")}
RELATIONS = {  # name: its wordings
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
SHARES = {"single": 0.62, "sized": 0.12, "recoloured": 0.10, "pair": 0.16}
HELD_OUT_SHARE = 0.08
NO_ARTICLE = {"grapes", "cherries", "fries", "corn", "broccoli", "bread", "cheese", "lightning", "earth", "fire"}

ONE_TEMPLATES = (  # wording, share; {thing} has its article, {bare} has not, {ground} is "a blue background"
    ("{thing} on {ground}", 0.42),
    ("a picture of {thing} on {ground}", 0.12),
    ("{bare}, {colour} background", 0.10),
    ("{ground} with {thing}", 0.08),
    ("{thing}, {ground}", 0.06),
    ("{bare} on {colour}", 0.08),
    ("an emoji of {thing} on {ground}", 0.06),
    ("{thing} in front of {ground}", 0.04),
    ("{thing}", 0.04),  # last: the one wording that leaves the background open
)
PAIR_TEMPLATES = (
    ("{first} {relation} {second} on {ground}", 0.60),
    ("a picture of {first} {relation} {second} on {ground}", 0.15),
    ("{first} {relation} {second}, {colour} background", 0.15),
    ("{ground} with {first} {relation} {second}", 0.10),
)


def read_objects(path: Path) -> dict[str, str]:
    """The core set: plain name -> emoji, in the file's order ("🍋 lemon", one a line)."""
    pairs = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {name: emoji for emoji, name in pairs}


OBJECTS = read_objects(Path(__file__).with_name("objects.txt"))
NAMES = tuple(OBJECTS)


@dataclass(frozen=True)
class Spec:
    """What one scene shows. For two objects, "objects[0] relation objects[1]" is true of the picture."""

    kind: str  # a key of SHARES
    objects: tuple[str, ...]  # one or two names
    background: str
    sizes: tuple[int, ...]  # pixels, from SIZES
    positions: tuple[tuple[int, int], ...]  # (x, y) of each centre
    relation: str | None = None
    recolour: str | None = None
    size_word: str | None = None


# ---- which combinations are held out -------------------------------------------------------------------------------


def is_held_out(*words: str) -> bool:
    """True for a fixed 8 % of combinations. By name, so that a longer list of objects moves none of them."""
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


# Tables of held-out combinations by index into NAMES, BACKGROUNDS and RECOLOURS.
HELD_GROUND = np.array([[is_held_out(name, "on", ground) for ground in BACKGROUNDS] for name in NAMES])
HELD_COLOUR = np.array([[is_held_out(name, "coloured", colour) for colour in RECOLOURS] for name in NAMES])
HELD_PAIR = np.array([[is_held_out(*sorted((a, b))) for b in NAMES] for a in NAMES])
SAME_COLOUR = np.array([[ground == colour for ground in BACKGROUNDS] for colour in RECOLOURS])


# ---- random numbers ------------------------------------------------------------------------------------------------


def mix(x: UInt64s) -> UInt64s:
    """The finaliser of splitmix64 (Steele et al. 2014): uint64 -> uint64, a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, indices: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for each index, a counter-based draw: row i depends on (seed, indices[i]) alone."""
    state = mix(mix(np.array([seed], dtype=np.uint64)) + np.asarray(indices, dtype=np.uint64))  # (B,)
    bits = mix(state[:, None] + mix(np.arange(count, dtype=np.uint64))[None])  # (B, count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


# ---- the glyphs ----------------------------------------------------------------------------------------------------


def draw_glyph(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji cropped to its visible box and padded to a square; RGBA, straight alpha."""
    image = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    # The variation selector asks for colour, which this font always is; basic layout would draw it as a box.
    ImageDraw.Draw(image).text((20, 20), emoji.replace("\ufe0f", ""), font=font, embedded_color=True)
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font {FONT.name} draws nothing for {emoji!r}: take another emoji in objects.txt")
    glyph = image.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


def build_atlas(objects: Mapping[str, str] = OBJECTS, font: Path = FONT) -> torch.Tensor:
    """Every object at every size, centred: (len(SIZES), len(objects), 128, 128, 4) uint8, premultiplied RGBA."""
    if not font.is_file():
        raise FileNotFoundError(
            f"the emoji font is not at {font}: install it (Debian, Ubuntu: apt install fonts-noto-color-emoji)"
        )
    face = ImageFont.truetype(str(font), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    atlas = np.zeros((len(SIZES), len(objects), SIDE, SIDE, 4), dtype=np.uint8)
    for n, emoji in enumerate(objects.values()):
        glyph = draw_glyph(emoji, face).convert("RGBa")  # premultiplied, so that no dark rim appears when resized
        for s, size in enumerate(SIZES):
            small = np.array(glyph.resize((size, size), Image.Resampling.LANCZOS))
            small[..., :3] = np.minimum(small[..., :3], small[..., 3:])  # Lanczos overshoots
            start = (SIDE - size) // 2
            atlas[s, n, start : start + size, start : start + size] = small
    return torch.from_numpy(atlas)


def over(glyphs: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    """Porter and Duff 1984, "over": premultiplied glyphs (B, H, W, 4) on opaque colours (B, H, W, 3), in 0..255."""
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


# ---- words ---------------------------------------------------------------------------------------------------------


def with_article(phrase: str, name: str) -> str:
    """ "a lemon", "an apple", "a unicorn", "grapes": `phrase` is `name` with adjectives before it."""
    if name in NO_ARTICLE:
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def pick(options: Sequence[tuple[str, float]], u: float) -> str:
    """The option at u in [0, 1) of the options' shares, which sum to 1."""
    for name, share in options:
        u -= share
        if u < 0:
            return name
    return options[-1][0]


def choose(options: Sequence[T], u: float) -> T:
    """One of the options, all equally likely, by u in [0, 1)."""
    return options[int(u * len(options))]


def caption(spec: Spec, u: Sequence[float], *, name_background: bool = False) -> str:
    """A wording of `spec`, chosen by three numbers in [0, 1); `name_background` leaves out the one that hides it."""
    colour = choose(SPELLINGS.get(spec.background, (spec.background,)), u[0])
    words = {"colour": colour, "ground": f"{with_article(colour, colour)} background"}
    if spec.relation:
        first, second = (with_article(name, name) for name in spec.objects)
        relation = choose(RELATIONS[spec.relation], u[1] ** 2)  # u squared: the plain wording comes more often
        return pick(PAIR_TEMPLATES, u[2]).format(first=first, second=second, relation=relation, **words)
    bare = " ".join(word for word in (spec.size_word, spec.recolour, spec.objects[0]) if word)
    template = pick(ONE_TEMPLATES, u[2])
    if name_background and template == ONE_TEMPLATES[-1][0]:
        template = ONE_TEMPLATES[0][0]
    return template.format(thing=with_article(bare, spec.objects[0]), bare=bare, **words)


def caption_words() -> list[str]:
    """Texts that hold every word a caption may hold: what the tokenizer's table is cut by."""
    colours = {*BACKGROUNDS, *RECOLOURS, *(word for words in SPELLINGS.values() for word in words)}
    things = [with_article(name, name) for name in NAMES]
    relations = [wording for wordings in RELATIONS.values() for wording in wordings]
    filling = dict.fromkeys(("thing", "bare", "first", "second", "relation", "colour"), "a")
    templates = [template.format(ground="a background", **filling) for template, _ in (*ONE_TEMPLATES, *PAIR_TEMPLATES)]
    return [*things, *sorted(colours), *relations, *templates, "an", "small", "large"]


# ---- scenes --------------------------------------------------------------------------------------------------------


def choose_allowed(allowed: npt.NDArray[np.bool_], u: float) -> str:
    """One of the backgrounds that a boolean vector over BACKGROUNDS allows, all equally likely."""
    names = tuple(BACKGROUNDS)
    return names[choose(np.flatnonzero(allowed).tolist(), u)]


class Scenes:
    """An endless, indexed collection of scenes; see the module's docstring.

    `shares` is the mixture of kinds. The atlas is built from the font when the first picture is composed, unless given.
    """

    def __init__(
        self,
        seed: int,
        device: str | torch.device = "cpu",
        held_out: bool = False,
        *,
        shares: Mapping[str, float] = SHARES,
        atlas: torch.Tensor | None = None,
    ) -> None:
        self.seed, self.device, self.held_out, self.shares = seed, torch.device(device), held_out, tuple(shares.items())
        self._atlas = atlas
        # The combinations that the split may show: rows of (object, background), (object, recolour), (first, second).
        self.grounds: list[list[int]] = np.argwhere(held_out == HELD_GROUND).tolist()
        self.colours: list[list[int]] = np.argwhere(held_out == HELD_COLOUR).tolist()
        self.pairs: list[list[int]] = np.argwhere((held_out == HELD_PAIR) & ~np.eye(len(NAMES), dtype=bool)).tolist()

    def specs(self, indices: Sequence[int]) -> tuple[list[str], list[Spec]]:
        """Captions and specs of these scenes; needs no font."""
        captions, specs = [], []
        for u in uniforms(self.seed, indices, 12).tolist():
            specs.append(self._spec(u))
            captions.append(caption(specs[-1], u[9:], name_background=self.held_out))
        return captions, specs

    def _spec(self, u: Sequence[float]) -> Spec:
        """One scene from nine numbers in [0, 1)."""
        kind = pick(self.shares, u[0])
        if kind == "pair":
            i, j = choose(self.pairs, u[1])
            allowed = ~(HELD_GROUND[i] | HELD_GROUND[j])
            relation = choose(tuple(RELATIONS), u[3])
            size = choose(PAIR, u[4])
            near, far = (round(3 * (2 * v - 1)) for v in u[5:7])  # no glyph is cut, none overlap
            across = round(10 * (2 * u[7] - 1))  # both objects share it: neither hides which stands where
            low, high = 32 + near, SIDE - 32 + far
            along = (low, high) if relation in ("left of", "above") else (high, low)
            side_by_side = relation in ("left of", "right of")
            centre = SIDE // 2 + across
            positions = tuple((a, centre) if side_by_side else (centre, a) for a in along)
            return Spec(kind, (NAMES[i], NAMES[j]), choose_allowed(allowed, u[2]), (size, size), positions, relation)
        tint = word = None
        if kind == "recoloured":
            i, c = choose(self.colours, u[1])
            tint = tuple(RECOLOURS)[c]
            ground = choose_allowed(~HELD_GROUND[i] & ~SAME_COLOUR[c], u[2])
        else:
            i, g = choose(self.grounds, u[1])
            ground = tuple(BACKGROUNDS)[g]
        sizes: tuple[int, ...] = PLAIN
        if kind == "sized":
            word, sizes = (("small", SMALL), ("large", LARGE))[u[3] >= 0.5]
        position = (SIDE // 2 + round(6 * (2 * u[5] - 1)), SIDE // 2 + round(6 * (2 * u[6] - 1)))
        return Spec(kind, (NAMES[i],), ground, (choose(sizes, u[4]),), (position,), None, tint, word)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[str], list[Spec]]:
        """Pixels (B, 3, 128, 128) float32 in [-1, 1], captions, specs."""
        captions, specs = self.specs(indices)
        return self.compose(specs), captions, specs

    def compose(self, specs: Sequence[Spec]) -> torch.Tensor:
        """Draw specs: (B, 3, 128, 128) float32 in [-1, 1], on the device."""
        if self._atlas is None:
            self._atlas = build_atlas()
        self._atlas = self._atlas.to(self.device)
        grounds = torch.tensor([BACKGROUNDS[spec.background] for spec in specs], dtype=torch.float32)
        canvas = over(self._place(specs, 0), grounds.to(self.device)[:, None, None])  # (B, H, W, 3) in 0..255
        rows = [b for b, spec in enumerate(specs) if len(spec.objects) == 2]
        if rows:
            where = torch.tensor(rows, device=self.device)
            canvas[where] = over(self._place([specs[b] for b in rows], 1), canvas[where])
        return (canvas / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def _place(self, specs: Sequence[Spec], layer: int) -> torch.Tensor:
        """One object of each spec, moved to its position: (B, 128, 128, 4) float32 in 0..255, premultiplied."""
        assert self._atlas is not None
        table = [
            (SIZES.index(spec.sizes[layer]), NAMES.index(spec.objects[layer]), *spec.positions[layer]) for spec in specs
        ]
        size, glyph, x, y = torch.tensor(table, device=self.device).T
        axis = torch.arange(SIDE, device=self.device)
        # Beyond the edge the atlas's border repeats, which is empty: every glyph is smaller than the picture.
        columns = (axis[None] - x[:, None] + SIDE // 2).clamp(0, SIDE - 1)  # (B, W)
        rows = (axis[None] - y[:, None] + SIDE // 2).clamp(0, SIDE - 1)  # (B, H)
        packed = self._atlas.view(torch.int32)[..., 0]  # one pixel is one number: a quarter of the gathers
        index = (size[:, None, None], glyph[:, None, None], rows[:, :, None], columns[:, None, :])
        placed = packed[index].unsqueeze(-1).view(torch.uint8).float()
        tinted = [b for b, spec in enumerate(specs) if spec.recolour]
        if tinted:
            colours = torch.tensor([RECOLOURS[specs[b].recolour or ""] for b in tinted], dtype=torch.float32)
            where = torch.tensor(tinted, device=self.device)
            placed[where] = recolour(placed[where], colours.to(self.device))
        return placed

    @classmethod
    def prompts(cls, count: int, seed: int = 0) -> list[tuple[str, Spec]]:
        """Held-out prompts for evaluation, the same for the same arguments: half single, a quarter pairs, a quarter
        recoloured. They name their background always. Needs no font."""
        kinds = ("single", "pair", "single", "recoloured")
        drawn = [cls(seed, held_out=True, shares={kind: 1.0}) for kind in kinds]
        rows = (drawn[i % len(kinds)].specs([i]) for i in range(count))
        return [(captions[0], specs[0]) for captions, specs in rows]


# ---- looking at them -----------------------------------------------------------------------------------------------


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] -> PIL images."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def contact_sheet(images: Sequence[Image.Image], texts: Sequence[str], columns: int) -> Image.Image:
    """Pictures in rows with their text under each, wrapped; all pictures of one size."""
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
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="the combinations that are never trained")
    options = parser.parse_args()
    scenes = Scenes(options.seed, held_out=options.held_out)
    pixels, captions, _ = scenes.batch(range(options.count))
    contact_sheet(to_images(pixels), captions, columns=8).save(options.sheet)
    print(f"{options.count} scenes written to {options.sheet}")


if __name__ == "__main__":
    main()
