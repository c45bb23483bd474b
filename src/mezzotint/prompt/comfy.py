r"""The grammar of ComfyUI: `(a)` weighs 1.1, `(a:1.3)` weighs 1.3 in any context, `\(` and `\)` are literal.

A bracket without a number multiplies the weight around it by 1.1, and a number replaces it. Each segment, text of one
weight between two brackets, is encoded separately. An empty text has no segments.
"""

from __future__ import annotations

import re

from mezzotint.prompt.pieces import SourceText, Span, format_decimal

_MARK = re.compile(r"\\[()]|[():]")


def spans(text: SourceText) -> list[Span]:
    """Return the segments, in order."""
    closing, colon = _match_brackets(text.text)
    result: list[Span] = []

    def add(start: int, end: int, weight: float) -> None:
        if start < end:
            segment = _unescape(text.slice(start, end))
            result.append(Span(segment.text, weight, segment.places))

    stack = [(0, len(text.text), 1.0)]  # unread ranges of the text, and the weight around them
    while stack:
        start, end, weight = stack.pop()
        opening = _first_bracket(text.text, start, end)
        add(start, opening, weight)
        close = closing.get(opening, end)
        if close >= end:  # unclosed: a segment up to the end, except for a bracket at the end
            close = end - 1
            if close <= opening or close not in colon:
                add(opening, end, weight)
                continue
        stack.append((close + 1, end, weight))
        number = _parse_float(text.text[colon[close] + 1 : close]) if colon[close] > opening + 1 else None
        if number is None:
            stack.append((opening + 1, close, weight * 1.1))
        else:
            stack.append((opening + 1, colon[close], number))
    return result


def _match_brackets(text: str) -> tuple[dict[int, int], dict[int, int]]:
    """Return where each bracket closes, and for each closing one the last colon since the previous bracket (or -1)."""
    closing: dict[int, int] = {}
    colon: dict[int, int] = {}
    open_brackets: list[int] = []
    last_colon = -1
    for match in _MARK.finditer(text):
        match match[0]:
            case ":":
                last_colon = match.start()
                continue
            case "(":
                open_brackets.append(match.start())
            case ")":
                colon[match.start()] = last_colon
                if open_brackets:
                    closing[open_brackets.pop()] = match.start()
        last_colon = -1
    return closing, colon


def _first_bracket(text: str, start: int, end: int) -> int:
    """Return the first opening bracket that counts, or `end`; an extra closing bracket cancels the next opening one."""
    depth = 0
    for match in _MARK.finditer(text, start, end):
        if match[0] == "(":
            if depth == 0:
                return match.start()
            depth += 1
        elif match[0] == ")":
            depth -= 1
    return end


def _parse_float(text: str) -> float | None:
    """Return the number, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _unescape(text: SourceText) -> SourceText:
    """Remove the backslash before brackets."""
    if "\\" not in text.text:
        return text
    parts, start = [], 0
    for match in re.finditer(r"\\[()]", text.text):
        parts.append(text.slice(start, match.start()))
        start = match.start() + 1
    return SourceText.join([*parts, text.slice(start)])


def write(pairs: list[tuple[str, float]]) -> str:
    """Return the text that reads as these pairs; text of weight 1 has no brackets unless it follows another."""
    out: list[str] = []
    bare = False
    for index, (text, weight) in enumerate(pairs):
        last = index == len(pairs) - 1
        bare = weight == 1.0 and not bare and (last or not text.endswith("\\"))
        text = re.sub(r"[()]", r"\\\g<0>", text)
        out.append(text if bare else f"({text}:{format_decimal(weight)})")
    return "".join(out)
