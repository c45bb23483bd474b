"""What a scene may show, how captions say it, and which combinations are held out. No torch, no pictures here.

A combination is two words: (object, background), (object, colour), (object, number) or (object, object). A fixed hash
of the words holds out 8 % of them, so a longer list moves none of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent
HELD_OUT_SHARE = 0.08

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
PATTERNS = ("stripes", "gradient")  # each in every colour
PLACES = ("night sky", "grass")
GROUNDS = (*BACKGROUNDS, *(f"{colour} {pattern}" for pattern in PATTERNS for colour in BACKGROUNDS), *PLACES)
GROUND_SHARES = (("colour", 0.76), ("stripes", 0.09), ("gradient", 0.09), ("night sky", 0.03), ("grass", 0.03))
RECOLOURS = {
    "red": (225, 40, 50),
    "yellow": (255, 215, 40),
    "green": (50, 165, 60),
    "blue": (40, 100, 230),
    "purple": (140, 60, 190),
    "pink": (255, 120, 180),
}
RELATIONS = {  # name: its share among pairs, its wordings
    "left of": (0.2, ("left of", "to the left of")),
    "right of": (0.2, ("right of", "to the right of")),
    "above": (0.2, ("above", "on top of")),
    "below": (0.2, ("below", "under")),
    "inside": (0.1, ("inside", "in")),
    "next to": (0.1, ("next to", "beside", "and")),
}
NUMBERS = {"two": 2, "three": 3}
SIZE_WORDS = ("small", "large")
NO_ARTICLE = {"grapes", "cherries", "fries", "corn", "broccoli", "bread", "cheese", "lightning", "earth", "fire"}
PLURALS = {"mouse": "mice", "fish": "fish", "leaf": "leaves", "snowman": "snowmen"}
OTHER_WORD_SHARE = 0.12  # of single objects that have another word

ONE_TEMPLATES = (  # wording, share; {thing} has its article, {bare} has not
    ("{thing} on {ground}", 0.42),
    ("a picture of {thing} on {ground}", 0.12),
    ("{bare}, {short}", 0.10),
    ("{ground} with {thing}", 0.08),
    ("{thing}, {ground}", 0.06),
    ("{bare} on {tiny}", 0.08),
    ("an emoji of {thing} on {ground}", 0.06),
    ("{thing} in front of {ground}", 0.04),
    ("{thing}", 0.04),  # last: the one wording that leaves the background open
)
PAIR_TEMPLATES = (
    ("{first} {relation} {second} on {ground}", 0.58),
    ("a picture of {first} {relation} {second} on {ground}", 0.14),
    ("{first} {relation} {second}, {short}", 0.14),
    ("{ground} with {first} {relation} {second}", 0.08),
    ("{first} {relation} {second}", 0.06),  # as above
)


def read_objects(path: Path) -> dict[str, str]:
    """Read the emoji of each plain name, in the file's order ("🍋 lemon", one per line)."""
    pairs = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: emoji for emoji, name in pairs}


def read_words(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the other words for each name ("lemon: citrus, ...", one per line)."""
    pairs = (line.split(": ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: tuple(words.split(", ")) for name, words in pairs}


CORE = read_objects(HERE / "objects.txt")
OBJECTS = CORE | read_objects(HERE / "more.txt")
NAMES = tuple(OBJECTS)
CORE_NAMES, MORE_NAMES = NAMES[: len(CORE)], NAMES[len(CORE) :]
OTHER_WORDS = read_words(HERE / "words.txt")


@dataclass(frozen=True)
class Spec:
    """What one scene shows. For a relation, "objects[0] relation objects[1]" is true of the picture.

    Places and sizes are multiples of 8 pixels, one latent: so a VAE of few parameters draws a glyph crisp.
    """

    kind: str  # single, sized, recoloured, pair or counted
    objects: tuple[str, ...]  # one to three names, in the order of the words
    background: str  # of GROUNDS
    sizes: tuple[int, ...]  # pixels
    corners: tuple[tuple[int, int], ...]  # (x, y) of each one's top left, pixels
    relation: str | None = None
    recolour: str | None = None
    size_word: str | None = None
    number: str | None = None


# ---- choosing ------------------------------------------------------------------------------------------------------


def pick(options: Sequence[tuple[T, float]], u: float) -> T:
    """Return the option at u in [0, 1) of the cumulative shares, which sum to 1."""
    for option, share in options:
        u -= share
        if u < 0:
            return option
    return options[-1][0]


def choose(options: Sequence[T], random: Random) -> T:
    """Choose one of the options uniformly. Only random() is guaranteed to give the same values in every Python."""
    return options[int(random.random() * len(options))]


@lru_cache(maxsize=1 << 18)
def is_held_out(*words: str) -> bool:
    """True for a fixed 8 % of combinations: (name, "on", ground), (name, "coloured", colour), (name, "times", number),
    or two names in alphabetical order."""
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def combinations(spec: Spec) -> list[tuple[str, ...]]:
    """Return all combinations that a picture of `spec` shows; the last is the one specific to its kind."""
    names = dict.fromkeys(spec.objects)
    shown: list[tuple[str, ...]] = [(name, "on", spec.background) for name in names]
    if spec.recolour:
        shown.append((spec.objects[0], "coloured", spec.recolour))
    if spec.number:
        shown.append((spec.objects[0], "times", spec.number))
    if spec.relation:
        shown.append(tuple(sorted(spec.objects)))
    return shown


# ---- captions ------------------------------------------------------------------------------------------------------


def with_article(phrase: str, name: str) -> str:
    """ "a lemon", "an apple", "a unicorn", "grapes": `phrase` is `name` with adjectives before it."""
    if name in NO_ARTICLE or (name.endswith("s") and not name.endswith(("ss", "us", "is", "os"))):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ewe"))
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(name: str) -> str:
    """ "lemons", "mice", "palm trees", "foxes", "trophies"."""
    *before, last = name.split()
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join([*before, last])


def ground_words(ground: str) -> dict[str, str]:
    """A background as captions say it: ground "a red striped background", short "red background", tiny "red"."""
    colour, _, pattern = ground.partition(" ")
    if ground in PLACES:
        return {"ground": {"night sky": "a night sky"}.get(ground, ground), "short": ground, "tiny": ground}
    phrase = f"{colour} {pattern.replace('stripes', 'striped')} background".replace("  ", " ")
    return {"ground": with_article(phrase, phrase), "short": ground if pattern else phrase, "tiny": ground}


def caption(spec: Spec, random: Random, *, name_background: bool = False) -> str:
    """Return a caption of `spec`; with `name_background`, one that names the background and uses the plain names."""
    ground = spec.background
    if ground.startswith("grey") and random.random() < 0.5:
        ground = ground.replace("grey", "gray")
    words = ground_words(ground)
    if spec.relation:
        templates: Sequence[tuple[str, float]] = PAIR_TEMPLATES
        wordings = RELATIONS[spec.relation][1]
        first, second = (with_article(name, name) for name in spec.objects)
        # squared: the plain wording comes more often
        words |= {"first": first, "second": second, "relation": wordings[int(random.random() ** 2 * len(wordings))]}
    else:
        templates = ONE_TEMPLATES
        name = spec.objects[0]
        others = OTHER_WORDS.get(name, ())
        if spec.number:
            bare = thing = f"{spec.number} {plural(name)}"
        else:
            said = name
            if spec.kind == "single" and others and not name_background and random.random() < OTHER_WORD_SHARE:
                said = choose(others, random)
            bare = " ".join(word for word in (spec.size_word, spec.recolour, said) if word)
            thing = with_article(bare, said)
        words |= {"thing": thing, "bare": bare}
    template = pick(templates, random.random())
    if name_background and template == templates[-1][0]:
        template = templates[0][0]
    return template.format(**words)


def caption_words() -> list[str]:
    """Return texts that contain every word of any caption, to reduce the tokenizer's vocabulary."""
    names = [word for name in NAMES for word in (with_article(name, name), *OTHER_WORDS.get(name, ()))]
    numbers = [f"{number} {plural(name)}" for number in NUMBERS for name in CORE_NAMES]
    grounds = [word for ground in (*GROUNDS, "gray") for word in ground_words(ground).values()]
    relations = [wording for _, wordings in RELATIONS.values() for wording in wordings]
    blank = dict.fromkeys(("thing", "bare", "first", "second", "relation", "ground", "short", "tiny"), "a")
    templates = [template.format(**blank) for template, _ in (*ONE_TEMPLATES, *PAIR_TEMPLATES)]
    return [*names, *numbers, *grounds, *relations, *templates, "an", *SIZE_WORDS, *RECOLOURS]
