"""Write more.txt and words.txt: every emoji that a person would name, except the core set, and synonyms for all.

    python recipes/emoji/names.py       # reads Unicode's emoji list and CLDR's English annotations (Debian packages
                                        # unicode-data, unicode-cldr-core) and the font; the results are committed

more.txt: "🦔 hedgehog", one a line, in Unicode's order. words.txt: "lemon: citrus fruit, ...", the CLDR keywords that
belong to no other object. Left out: flags, skin tones, families, keycaps, buttons and letters, clock faces; a man's and
a woman's form where there is a person's; names of more than six tokens; names that would be taken for other words of a
caption (sizes, places, "a blue book").
"""

from __future__ import annotations

import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from mezzotint.models.tokenizer import Tokenizer
from words import BACKGROUNDS, CORE, RECOLOURS

HERE = Path(__file__).parent
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
LEFT_OUT = {"keycap", "alphanum", "av-symbol", "family", "geometric", "zodiac"}  # subgroups
CLASHING = {"left", "right", "above", "below", "inside", "small", "large", "two", "three", "on", "background", "to"}
"""Words that mean something else in a caption."""


def read_annotations() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Read the short name and the keywords of each emoji, without variation selectors."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for entry in ElementTree.parse(ANNOTATIONS / folder / "en.xml").iter("annotation"):
            emoji, text = entry.get("cp") or "", entry.text or ""
            if entry.get("type") == "tts":
                names[emoji] = text
            else:
                keywords[emoji] = [word.strip() for word in text.split("|")]
    return names, keywords


def plain(text: str) -> str:
    """Lower-case a text and drop accents and punctuation except hyphens: "Santa Claus" -> "santa claus"."""
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9\- ]", "", letters).split())


def emojis() -> list[str]:
    """Return the fully qualified emoji of the groups in use, without variation selectors."""
    kept, group, subgroup = [], "", ""
    for line in EMOJI_LIST.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# (sub)?group: (.*)", line):
            group, subgroup = (group, heading[2].strip()) if heading[1] else (heading[2].strip(), "")
        elif "; fully-qualified" in line and group not in ("Flags", "Component") and subgroup not in LEFT_OUT:
            kept.append("".join(chr(int(code, 16)) for code in line.split(";")[0].split()).replace("\ufe0f", ""))
    return [emoji for emoji in kept if not re.search("[\U0001f3fb-\U0001f3ff]", emoji)]  # no skin tones


def main() -> None:
    names, keywords = read_annotations()
    tokenizer = Tokenizer.clip()
    core = {emoji.replace("\ufe0f", ""): name for name, emoji in CORE.items()}
    colours = {*BACKGROUNDS, *RECOLOURS}
    everyone = {plain(name) for name in names.values()}
    more: dict[str, str] = {}  # name: emoji
    for emoji in emojis():
        raw, name = names.get(emoji, ":"), plain(names.get(emoji, ""))
        words = set(name.split())
        neutral = re.sub(r"^(wo)?m[ae]n ", "", name)
        if (
            emoji in core
            or name in core.values()
            or name in more
            or ":" in raw
            or (neutral != name and everyone & {neutral, f"person {neutral}", f"people {neutral}"})
            or words & CLASHING
            or re.search(r"oclock|-thirty", name)
            or (words & colours and (words - colours) & {*core.values(), "book", "circle", "square"})
            or len(tokenizer.encode(name)) > 6
        ):
            continue
        more[name] = emoji
    objects = {**core, **{emoji: name for name, emoji in more.items()}}
    shared = Counter(word for emoji in objects for word in {plain(k) for k in keywords.get(emoji, ())})
    taken = {*objects.values(), *CLASHING, *colours}
    lines = []
    for emoji, name in objects.items():
        own = [
            word
            for word in dict.fromkeys(map(plain, keywords.get(emoji, ())))
            if shared[word] == 1 and word not in taken and word not in name.split() and len(tokenizer.encode(word)) <= 4
        ]
        if own:
            lines.append(f"{name}: {', '.join(own)}")
    (HERE / "more.txt").write_text("".join(f"{e} {n}\n" for n, e in more.items()), encoding="utf-8")
    (HERE / "words.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(more)} objects in addition to the core's {len(core)}; synonyms for {len(lines)}")


if __name__ == "__main__":
    main()
