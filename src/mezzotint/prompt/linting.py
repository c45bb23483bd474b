"""Finds what the author of a prompt may not have meant: marks of another dialect, and marks without effect."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Remark

# A pattern, the dialects that it is a mark of, and its equivalent in other dialects (with groups of the pattern).
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


def find_remarks(text: str, syntax: str) -> list[Remark]:
    """Return the remarks on a prompt, in the order of the text."""
    found = [*_foreign_marks(text, syntax), *_brackets(text, syntax), *_surprises(text, syntax)]
    return sorted(found, key=lambda remark: (remark.start, remark.end))


def _foreign_marks(text: str, syntax: str) -> Iterator[Remark]:
    """Find marks of other dialects."""
    for pattern, dialects, others in _MARKS:
        for match in re.finditer(pattern, text) if syntax not in dialects else ():
            sentence = f"`{match[0]}` has no meaning in {syntax}"
            if syntax in others:
                sentence += f"; did you mean `{match.expand(others[syntax])}`?"
            else:
                sentence += f"; it is {' and '.join(dialects)} syntax, and is read as words"
            yield Remark(*match.span(), sentence)


def _brackets(text: str, syntax: str) -> Iterator[Remark]:
    """Find brackets without a counterpart."""
    kinds = {"a1111": "()[]", "comfy": "()", "compel": "()", "plain": ""}[syntax]
    open_brackets: list[re.Match[str]] = []
    for match in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        if match[0] not in kinds:
            continue
        if kinds.index(match[0]) % 2 == 0:
            open_brackets.append(match)
        elif open_brackets and open_brackets[-1][0] == kinds[kinds.index(match[0]) - 1]:
            open_brackets.pop()
        else:
            yield Remark(*match.span(), f"`{match[0]}` closes no bracket; write `\\{match[0]}` for the character")
    end = "closes at the end" if syntax == "a1111" else "is read as the character"
    for match in open_brackets:
        yield Remark(*match.span(), f"`{match[0]}` is never closed, and {end}; write `\\{match[0]}` for the character")


def _surprises(text: str, syntax: str) -> Iterator[Remark]:
    """Find marks with a surprising effect, or none."""
    from mezzotint.prompt import plan

    try:
        meaning = plan(text, syntax, 100)
    except RequestError as error:
        yield Remark(0, len(text), str(error))
        return
    if syntax == "compel":
        for match in re.finditer(r"\.swap\s*+\(", text):
            yield Remark(*match.span(), "`.swap(...)` has no effect: only the text before it is encoded")
    if syntax != "a1111":
        return
    for match in re.finditer(r"#[^\n]*", text):
        yield Remark(*match.span(), "`#` hides the rest of its line")
    for part in meaning.parts:
        for span in part.variants[-1].spans:
            if span.text == "BREAK" and not span.is_break:
                yield Remark(span.start, span.end, "BREAK in brackets does not end the chunk; it is an ordinary word")
    if len(meaning.parts) == 1 and meaning.parts[0].weight != 1.0:
        weight = meaning.parts[0].weight
        yield Remark(
            0, len(text), f"the number at the end weights the whole prompt ({weight:g}), although there is no AND"
        )
    for match in re.finditer(r"(?<!\\)\[[^()\[\]|:]*:[^()\[\]|:]*:[^()\[\]|]*\]", text):
        if not re.search(r":\s*[+-]?[.\d]+\s*\]$", match[0]):
            yield Remark(*match.span(), f"`{match[0]}` does not end with a number, so it is not prompt editing")
