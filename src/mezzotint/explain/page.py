"""Draw an explanation as one image: the picture, and for each word its heat map over the picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mezzotint.explain.maps import Explanation, Word

TILE, SMALL = 224, 108  # pixels: the longer side of a content word's map and of a function word's
COLUMNS = 4  # maps per row
GAP, LINE = 14, 20
MAX_WORDS = 100
PAPER, INK, PALE = "white", (25, 25, 28), (130, 130, 136)
# words that relate other words and name nothing themselves
FUNCTION_WORDS = {"a", "an", "the", "of", "on", "in", "at", "to", "and", "or", "with", "by", "for", "from", "as", "is"}
# from lowest to highest: black, purple, red, orange, pale yellow, in even steps of lightness
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))

Array = NDArray[np.float32]


def page(explanation: Explanation, picture: int = 0) -> Image.Image:
    """Draw the page of one picture: prompt and picture at the top, then the words in order.

    A map is bright where its word received more attention than the other words did; each map has its own scale. The
    percentage is the word's share of all attention. Function words (a, of, on, ...) and punctuation are small, at the
    end, once each. A page shows the first 100 words.

    Args:
        explanation: The recorded maps.
        picture: The index of the picture.
    """
    image = explanation.result.images[picture].convert("RGB")
    content = [word for word in explanation.words if not _is_function_word(word)]
    functional = list({word.text.lower(): word for word in explanation.words if _is_function_word(word)}.values())
    left_out = max(len(content) - MAX_WORDS, 0)
    content, functional = content[:MAX_WORDS], functional[: max(MAX_WORDS - len(content), 0)]
    width = GAP + COLUMNS * (TILE + GAP)

    head = _head(explanation, picture, width)
    tiles = [_tile(explanation, image, picture, word, TILE) for word in content]
    small = [_tile(explanation, image, picture, word, SMALL) for word in functional]
    main = _resize(image, 2 * TILE + GAP)
    cell, line = (max((tile.height for tile in some), default=0) + GAP for some in (tiles, small))
    # the picture takes two columns; the words are to the right of it, then below it
    side_tiles = 2 * (-(-(main.height + GAP) // cell) if tiles else 1)
    spots = [(2 + k % 2, k // 2) for k in range(side_tiles)]
    spots += [(k % COLUMNS, side_tiles // 2 + k // COLUMNS) for k in range(len(tiles))]
    top = head.height
    bottom = top + max(main.height + GAP, *((row + 1) * cell for _, row in spots[: len(tiles)]), 0)
    notes = [
        "Bright: where the word received more attention than the others. Each map has its own scale.",
        "%: the word's share of all attention. The rest goes to the start and end tokens and to padding.",
        *([f"{left_out} more words are not shown."] if left_out else []),
    ]
    fit = (width - GAP) // (SMALL + GAP)
    below = bottom + -(-len(small) // fit) * line

    whole = Image.new("RGB", (width, below + len(notes) * LINE + GAP), PAPER)
    whole.paste(head, (0, 0))
    whole.paste(main, (GAP, top))
    for tile, (column, row) in zip(tiles, spots, strict=False):
        whole.paste(tile, (GAP + column * (TILE + GAP), top + row * cell))
    for k, tile in enumerate(small):
        whole.paste(tile, (GAP + k % fit * (SMALL + GAP), bottom + k // fit * line))
    for k, note in enumerate(notes):
        ImageDraw.Draw(whole).text((GAP, below + k * LINE), note, PALE, _font(13))
    return whole


def overlay(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """Draw a heat map (H, W) over the picture of that size: low values dark and grey, high ones in warm colours."""
    level = (heat / heat.max().clamp(min=1e-12)).numpy()[..., None]  # (H, W, 1) in [0, 1]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * np.ones(3, np.float32)
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(level[..., 0], stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    strength = 0.25 + 0.5 * np.sqrt(level)  # opacity of the colour
    return Image.fromarray(((1 - strength) * grey * 0.75 + strength * colour).astype(np.uint8))


def _is_function_word(word: Word) -> bool:
    """Return whether a word is a function word or punctuation."""
    return word.text.lower() in FUNCTION_WORDS or not any(letter.isalnum() for letter in word.text)


def _head(explanation: Explanation, picture: int, width: int) -> Image.Image:
    """Draw the prompt, and the sampler, steps and seed below it."""
    request, seeds = explanation.result.request, explanation.result.seeds
    lines = _wrap(request.prompt, _font(24), width - 2 * GAP)
    head = Image.new("RGB", (width, 32 * len(lines) + LINE + 3 * GAP), PAPER)
    draw = ImageDraw.Draw(head)
    for k, line in enumerate(lines):
        draw.text((GAP, GAP + 32 * k), line, INK, _font(24))
    facts = f"{request.sampler}, {request.steps} steps, seed {seeds[picture]}"
    draw.text((GAP, 32 * len(lines) + GAP + 4), facts, PALE, _font(14))
    return head


def _tile(explanation: Explanation, image: Image.Image, picture: int, word: Word, size: int) -> Image.Image:
    """Draw a word's map with the word below it."""
    small = size == SMALL
    heat = explanation.map(word, picture=picture)
    share = explanation.share(word, picture=picture)
    shown = _resize(overlay(image, heat), size)
    tile = Image.new("RGB", (size, shown.height + LINE + 6), PAPER)
    tile.paste(shown, ((size - shown.width) // 2, 0))
    draw, font = ImageDraw.Draw(tile), _font(13 if small else 18)
    draw.text((0, shown.height + 3), word.text, PALE if small else INK, font)
    percent = f"{100 * share:.{0 if share >= 0.095 else 1}f} %"
    draw.text((size, shown.height + 6), percent, PALE, _font(12), anchor="ra")
    return tile


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its longer side is `size`."""
    scale = size / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Wrap a text to at most ten lines of at most `width` pixels."""
    lines = [""]
    for word in text[:2000].split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines if len(lines) <= 10 else [*lines[:9], "..."]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
