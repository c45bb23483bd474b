r"""The grammar of ComfyUI: `(a)` weighs 1.1, `(a:1.3)` 1.3 whatever is around it, `\(` and `\)` are letters.

A bare bracket multiplies the weight around it by 1.1, a number replaces it. Every segment, text of one weight between
two brackets, stays by itself: segments are encoded one by one. No text is no segment.
"""

from __future__ import annotations

import re

from mezzotint.prompt.pieces import Span, Traced, decimal

_MARK = re.compile(r"\\[()]|[():]")


def spans(text: Traced) -> list[Span]:
    """The segments, in their order."""
    closing, colon = _pairs(text.text)
    result: list[Span] = []

    def add(start: int, end: int, weight: float) -> None:
        if start < end:
            segment = _unescaped(text.cut(start, end))
            result.append(Span(segment.text, weight, segment.places))

    stack = [(0, len(text.text), 1.0)]  # stretches of text still to be read, and the weight around them
    while stack:
        start, end, weight = stack.pop()
        opening = _first_bracket(text.text, start, end)
        add(start, opening, weight)
        close = closing.get(opening, end)
        if close >= end:  # never closed: a segment up to the end, but for a bracket that happens to stand there
            close = end - 1
            if close <= opening or close not in colon:
                add(opening, end, weight)
                continue
        stack.append((close + 1, end, weight))
        number = _number(text.text[colon[close] + 1 : close]) if colon[close] > opening + 1 else None
        if number is None:
            stack.append((opening + 1, close, weight * 1.1))
        else:
            stack.append((opening + 1, colon[close], number))
    return result


def _pairs(text: str) -> tuple[dict[int, int], dict[int, int]]:
    """Where each bracket closes; and before each closing one, the last colon with no bracket in between, or -1."""
    closing: dict[int, int] = {}
    colon: dict[int, int] = {}
    opened: list[int] = []
    last_colon = -1
    for match in _MARK.finditer(text):
        match match[0]:
            case ":":
                last_colon = match.start()
                continue
            case "(":
                opened.append(match.start())
            case ")":
                colon[match.start()] = last_colon
                if opened:
                    closing[opened.pop()] = match.start()
        last_colon = -1
    return closing, colon


def _first_bracket(text: str, start: int, end: int) -> int:
    """The first opening bracket that counts, or `end`: a closing one too many takes the next opening one with it."""
    depth = 0
    for match in _MARK.finditer(text, start, end):
        if match[0] == "(":
            if depth == 0:
                return match.start()
            depth += 1
        elif match[0] == ")":
            depth -= 1
    return end


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unescaped(text: Traced) -> Traced:
    if "\\" not in text.text:
        return text
    parts, start = [], 0
    for match in re.finditer(r"\\[()]", text.text):
        parts.append(text.cut(start, match.start()))
        start = match.start() + 1
    return Traced.join([*parts, text.cut(start)])


def write(pairs: list[tuple[str, float]]) -> str:
    """The text that reads as these (text, weight) pairs. A text of weight 1 is bare, but beside another one."""
    out: list[str] = []
    bare = False
    for index, (text, weight) in enumerate(pairs):
        last = index == len(pairs) - 1
        bare = weight == 1.0 and not bare and (last or not text.endswith("\\"))
        text = re.sub(r"[()]", r"\\\g<0>", text)
        out.append(text if bare else f"({text}:{decimal(weight)})")
    return "".join(out)
