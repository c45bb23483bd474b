"""Finds what the author of a prompt may not have meant: marks of another dialect, and marks without effect."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import PromptPlan, Remark, format_decimal

# A pattern, the dialects that it is a mark of, and its equivalent in other dialects (with groups of the pattern).
_MARKS: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
    (r"(?<!\\)\(([^()\[\]:]*):\s*([+-]?[.\d]+)\s*\)", ("a1111", "comfy"), {"compel": r"(\1)\2"}),
    (r"(?<!\\)\[([^()\[\]:|]+)\]", ("a1111",), {"comfy": r"(\1:0.91)", "compel": r"(\1)0.91"}),
    (r"(?<!\\)\[[^()\[\]|]*:\s*[+-]?[.\d]+\s*\]", ("a1111",), {}),
    (r"(?<!\\)\[[^()\[\]|]*\|[^()\[\]]*\]", ("a1111",), {}),
    (r"\b(?:BREAK|AND)\b", ("a1111",), {}),
    (r"<(?:lora|lyco|hypernet):([^<>:]+)(?::([.\d]+))?[^<>]*>", ("a1111",), {"compel": r"withLora(\1, \2)"}),
    (r"(?<!\\)\(([^()\[\]:]+)\)(\d*\.?\d+)(?!\w)", ("compel",), {"a1111": r"(\1:\2)", "comfy": r"(\1:\2)"}),
    # of one letter: C++, A++
    (r"(?<!\w)(\w\w+)(?:\+\++|--+)(?![\w+-])", ("compel",), {"a1111": r"(\1:1.21)", "comfy": r"(\1:1.21)"}),
    (r"\)\.(?:and|blend)\(|\.(?:swap|attend)\(|\b(?:with|use)Lora\(", ("compel",), {}),
    (r"\bembedding:[^\s,()]+", ("comfy",), {}),
    (r"(?<!\\)\{[^{}|]*\|[^{}]*\}", ("comfy",), {}),
    (r"__(?:[^_\n{|}\\]|_(?!_))+__", ("comfy",), {}),
]
_ONLY_POSITIVE = r"\bAND\b|<(?:lora|lyco|hypernet):[^<>]*>"  # of a1111
# A pattern, the dialects in which it surprises (none given: all), and the sentence.
_SURPRISES: list[tuple[str, tuple[str, ...], str]] = [
    (r"\.swap\s*+\(", ("compel",), "`.swap(...)` has no effect: only the text before it is encoded"),
    (
        r"#[^\n]*",
        ("a1111",),
        "`#` hides the rest of its line (`{}`); prompt_syntax comfy and plain have no comments of this kind",
    ),
    (
        r"(?<![\w.])(?:\d++(?:\.\d++)?|\.\d++)::",
        ("comfy",),
        "`{}` is read as words: a choice takes no weight, as it would in Dynamic Prompts; repeat an option instead",
    ),
    (
        r"(?<![\w.$-])[\d-]++\$\$",
        ("comfy",),
        "`{}` is read as words: a choice draws one option, and not several as in Dynamic Prompts",
    ),
    (
        r"(?<![^\s()])embedding:[^\s,()]++,++embedding:[^\s()]+",
        ("comfy",),
        "`{}`: both embeddings are used, but ComfyUI loads neither unless a space comes before the second",
    ),
    (
        r"(?<![^\s()])(?!embedding:)[^\s()]+embedding:[^\s,()]+",
        ("comfy",),
        "`{}` is read as words: an embedding is used only at the beginning, or after a space or a bracket",
    ),
    (
        r"(?m)^(?:Steps: *\d|Negative prompt:)[^\n]*",
        (),
        "`{}` looks like a line of settings, and is read as words; give its values as options of their own",
    ),
]


def find_remarks(
    text: str,
    syntax: str,
    meaning: PromptPlan | None = None,
    negative: bool = False,
    embeddings: Container[str] = (),
) -> list[Remark]:
    """Return the remarks on a prompt; the arguments are those of `mezzotint.prompt.lint`."""
    found = [
        *_foreign_marks(text, syntax, negative, embeddings),
        *_brackets(text, syntax),
        *_surprises(text, syntax),
        *_effects(text, syntax, meaning, negative),
    ]
    return sorted(found, key=lambda remark: (remark.start, remark.end))


def _foreign_marks(text: str, syntax: str, negative: bool, embeddings: Container[str]) -> Iterator[Remark]:
    """Find marks of other dialects and, in a negative prompt, those that only a prompt may have."""
    for pattern, dialects, others in _MARKS:
        for match in re.finditer(pattern, text) if syntax not in dialects else ():
            if match[0].lower().removeprefix("embedding:") in embeddings:
                continue
            sentence = f"`{_shorten(match[0])}` has no meaning in {syntax}"
            if syntax in others:
                sentence += f"; did you mean `{_shorten(match.expand(others[syntax]))}`?"
            else:
                sentence += f"; it is {' and '.join(dialects)} syntax, and is read as words"
            yield Remark(*match.span(), sentence)
    for match in re.finditer(_ONLY_POSITIVE, text) if negative and syntax == "a1111" else ():
        yield Remark(*match.span(), f"`{_shorten(match[0])}` has no meaning in a negative prompt, and is read as words")


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
        elif text[match.start() - 1 : match.start()] not in (":", ";", "="):  # an emoticon
            yield Remark(*match.span(), f"`{match[0]}` closes no bracket; write `\\{match[0]}` for the character")
    end = "closes at the end" if syntax == "a1111" else "is read as the character"
    for match in open_brackets:
        yield Remark(*match.span(), f"`{match[0]}` is never closed, and {end}; write `\\{match[0]}` for the character")


def _surprises(text: str, syntax: str) -> Iterator[Remark]:
    """Find marks with a surprising effect, or none."""
    for pattern, dialects, sentence in _SURPRISES:
        for match in re.finditer(pattern, text) if syntax in dialects or not dialects else ():
            yield Remark(*match.span(), sentence.format(_shorten(match[0])))


def _effects(text: str, syntax: str, meaning: PromptPlan | None, negative: bool) -> Iterator[Remark]:
    """Find what surprises in the parsed prompt."""
    from mezzotint.prompt import plan

    try:
        meaning = meaning or plan(text, syntax, 100, negative=negative)
    except RequestError as error:
        yield Remark(0, len(text), str(error))
        return
    if syntax != "a1111":
        return
    for part in meaning.parts:
        for span in part.variants[-1].spans:
            if span.text == "BREAK" and not span.is_break:
                yield Remark(span.start, span.end, "BREAK in brackets does not end the chunk; it is an ordinary word")
    if len(meaning.parts) == 1 and meaning.parts[0].weight != 1.0:
        number = format_decimal(meaning.parts[0].weight)
        yield Remark(
            0,
            len(text),
            f"the number at the end weights the whole prompt ({number}), although there is no AND; write `:\\{number}` "
            "to have it read as words",
        )
    for match in re.finditer(r"(?<!\\)\[[^()\[\]|:]*:[^()\[\]|:]*:[^()\[\]|]*\]", text):
        if not re.search(r":\s*[+-]?[.\d]+\s*\]$", match[0]):
            yield Remark(*match.span(), f"`{match[0]}` does not end with a number, so it is not prompt editing")


def _shorten(text: str) -> str:
    """Shorten a quoted text to a line of 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."
