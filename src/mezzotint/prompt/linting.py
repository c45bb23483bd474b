"""What the author of a prompt may not have meant: the marks of another dialect, and those that come to nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Remark

# What is a mark in the dialects named, and how others say it (with the groups of the pattern), if they can.
_MARKS: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
    (r"(?<!\\)\(([^()\[\]:]*):\s*([+-]?[.\d]+)\s*\)", ("a1111", "comfy"), {"compel": r"(\1)\2"}),
    (r"(?<!\\)\[([^()\[\]:|]+)\]", ("a1111",), {"comfy": r"(\1:0.91)", "compel": r"(\1)0.91"}),
    (r"(?<!\\)\[[^()\[\]|]*:\s*[+-]?[.\d]+\s*\]", ("a1111",), {}),
    (r"(?<!\\)\[[^()\[\]|]*\|[^()\[\]]*\]", ("a1111",), {}),
    (r"\b(?:BREAK|AND)\b", ("a1111",), {}),
    (r"<(?:lora|lyco|hypernet):([^<>:]+)(?::([.\d]+))?[^<>]*>", ("a1111",), {"compel": r"withLora(\1, \2)"}),
    (r"(?<!\\)\(([^()\[\]:]+)\)(\d*\.?\d+)(?!\w)", ("compel",), {"a1111": r"(\1:\2)", "comfy": r"(\1:\2)"}),
    (r"(?<!\w)(\w+)(?:\+\++|--+)(?![\w+-])", ("compel",), {"a1111": r"(\1:1.21)", "comfy": r"(\1:1.21)"}),
    (r"\)\.(?:and|blend)\(|\.(?:swap|attend)\(|\b(?:with|use)Lora\(", ("compel",), {}),
    (r"\bembedding:[^\s,()]+", ("comfy",), {}),
    (r"(?<!\\)\{[^{}|]*\|[^{}]*\}", ("comfy",), {}),
    (r"__(?:[^_\n{|}\\]|_(?!_))+__", ("comfy",), {}),
]


def remarks(text: str, syntax: str) -> list[Remark]:
    found = [*_foreign(text, syntax), *_brackets(text, syntax), *_odd(text, syntax)]
    return sorted(found, key=lambda remark: (remark.start, remark.end))


def _foreign(text: str, syntax: str) -> Iterator[Remark]:
    for pattern, dialects, others in _MARKS:
        for match in re.finditer(pattern, text) if syntax not in dialects else ():
            sentence = f"`{match[0]}` has no meaning in {syntax}"
            if syntax in others:
                sentence += f"; did you mean `{match.expand(others[syntax])}`?"
            else:
                sentence += f": it is a mark of {' and '.join(dialects)}, and will be read as words"
            yield Remark(*match.span(), sentence)


def _brackets(text: str, syntax: str) -> Iterator[Remark]:
    kinds = {"a1111": "()[]", "comfy": "()", "compel": "()", "plain": ""}[syntax]
    opened: list[re.Match[str]] = []
    for match in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        if match[0] not in kinds or len(match[0]) > 1:
            continue
        if kinds.index(match[0]) % 2 == 0:
            opened.append(match)
        elif opened and opened[-1][0] == kinds[kinds.index(match[0]) - 1]:
            opened.pop()
        else:
            yield Remark(*match.span(), f"`{match[0]}` closes nothing; write `\\{match[0]}` if it is a letter")
    end = "counts as closed at the end" if syntax == "a1111" else "is read as a letter"
    for match in opened:
        yield Remark(*match.span(), f"`{match[0]}` is never closed, and {end}; write `\\{match[0]}` if it is a letter")


def _odd(text: str, syntax: str) -> Iterator[Remark]:
    from mezzotint.prompt import plan

    try:
        meaning = plan(text, syntax, 100)
    except RequestError as error:
        yield Remark(0, len(text), str(error))
        return
    if syntax == "compel":
        for match in re.finditer(r"\.swap\s*+\(", text):
            yield Remark(*match.span(), "`.swap(...)` changes nothing: what is encoded is the text before it")
    if syntax != "a1111":
        return
    for match in re.finditer(r"#[^\n]*", text):
        yield Remark(*match.span(), "`#` hides the rest of its line")
    for part in meaning.parts:
        for span in part.variants[-1].spans:
            if span.text == "BREAK" and not span.is_break:
                yield Remark(span.start, span.end, "BREAK in a bracket does not end the chunk: it becomes a word")
    if len(meaning.parts) == 1 and meaning.parts[0].weight != 1.0:
        weight = meaning.parts[0].weight
        yield Remark(
            0, len(text), f"the number at the end weighs the whole prompt ({weight:g}), although there is no AND"
        )
    for match in re.finditer(r"(?<!\\)\[[^()\[\]|:]*:[^()\[\]|:]*:[^()\[\]|]*\]", text):
        if not re.search(r":\s*[+-]?[.\d]+\s*\]$", match[0]):
            yield Remark(*match.span(), f"`{match[0]}` does not end with a number, so it is no prompt editing")
