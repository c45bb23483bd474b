"""The grammar of A1111's web UI: emphasis, BREAK, prompt editing, alternation, AND, networks and comments.

`(a)` weighs 1.1, `[a]` 1/1.1, `(a:1.3)` 1.3, and nested brackets multiply. `[from:to:when]` and `[a|b]` change the text
during the run. The passes follow the order of A1111: comments are removed, networks are extracted, the rest is split at
AND, each part becomes one text for each step, and each of those is weighted (`spans`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Clause, Network, Part, SourceText, Span, Variant, format_decimal, parse_number

_MAX_EXACT_BRACKETS = 32  # up to this depth, factors are multiplied in A1111's order; deeper, rounding may differ

_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_NETWORK = re.compile(r"<(\w+):")
_WHOLE_LINE_COMMENT = re.compile(r"(?:^|\n)#[^\n]*(?:\n|$)")
_COMMENT = re.compile(r"#[^\n]*(?:\n|$)")
_SCHEDULE_TOKEN = re.compile(r"(?:[^\\()\[\]:|]|\\.)+|[()\[\]:|]|\\")
_STEP = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


def spans(text: SourceText) -> list[Span]:
    """Return the spans of a text, with emphasis and BREAK.

    Adjacent spans of one weight are joined; an empty text is one empty span.
    """
    pieces: list[tuple[SourceText, float, int]] = []  # text, 1 or -1 (a BREAK), number of events before it
    events = array("q")  # numbers of brackets; the first occurrence opens the bracket, the second closes it
    # for each bracket: whether it is square, its factor, and its rank among the closing brackets
    square, factor, close_order = bytearray(), array("d"), array("q")
    open_brackets: tuple[list[int], list[int]] = ([], [])  # round, square
    num_closed = 0

    def close(bracket: int, by: float) -> None:
        nonlocal num_closed
        factor[bracket], close_order[bracket] = by, num_closed
        num_closed += 1

    for match in _TOKEN.finditer(text.text):
        token, start, end = match[0], match.start(), match.end()
        if token[0] == "\\":
            pieces.append((text.slice(start + 1, end), 1.0, len(events)))
        elif token in "([":
            events.append(len(square))
            open_brackets[token == "["].append(len(square))
            square.append(token == "[")
            factor.append(1.0)
            close_order.append(0)
        elif match[1] and open_brackets[0]:
            events.append(open_brackets[0].pop())
            close(events[-1], parse_number(match[1], token))
        elif token in ")]" and open_brackets[token == "]"]:
            events.append(open_brackets[token == "]"].pop())
            close(events[-1], 1.1 if token == ")" else 1 / 1.1)
        else:
            pieces.extend((piece, sign, len(events)) for piece, sign in _split_breaks(text.slice(start, end)))
    for bracket in open_brackets[0]:
        close(bracket, 1.1)
    for bracket in open_brackets[1]:
        close(bracket, 1 / 1.1)

    result: list[tuple[list[SourceText], float]] = []
    around: tuple[list[int], list[int]] = ([], [])  # the brackets around a piece, round and square
    product = ([1.0], [1.0])  # cumulative product of their factors, from the outermost in
    done, scale = 0, 1.0
    for piece, sign, before in pieces:
        if done < before:
            for bracket in events[done:before]:
                kind = square[bracket]
                if around[kind] and around[kind][-1] == bracket:
                    around[kind].pop()
                    product[kind].pop()
                else:
                    around[kind].append(bracket)
                    product[kind].append(product[kind][-1] * factor[bracket])
            done = before
            if len(around[0]) + len(around[1]) <= _MAX_EXACT_BRACKETS:
                scale = 1.0
                for bracket in sorted(around[0] + around[1], key=close_order.__getitem__):
                    scale *= factor[bracket]
            else:
                scale = product[0][-1] * product[1][-1]
        if result and result[-1][1] == sign * scale:
            result[-1][0].append(piece)
        else:
            result.append(([piece], sign * scale))
    joined = [(SourceText.join(parts), weight) for parts, weight in result]
    return [Span(part.text, weight, part.places) for part, weight in joined] or [Span("")]


def _split_breaks(text: SourceText) -> Iterator[tuple[SourceText, float]]:
    """Split a text at the word BREAK and strip the space around it: (text, 1) and (BREAK, -1) alternate."""
    start = 0
    for match in _BREAK.finditer(text.text):
        yield text.slice(start, start + len(text.text[start : match.start()].rstrip())), 1.0
        yield text.slice(*match.span()), -1.0
        start = len(text.text) - len(text.text[match.end() :].lstrip())
    yield text.slice(start), 1.0


def read(
    source: SourceText, steps: int, negative: bool, base_steps: int | None
) -> tuple[str, tuple[Part, ...], tuple[Network, ...]]:
    """Run all passes.

    Returns:
        The text without comments and networks, its parts, and the networks.
    """
    text = strip_comments(source)
    networks: list[Network] = []
    if not negative:
        text, networks = _extract_networks(text)
    parts = []
    for piece, weight in [(text, 1.0)] if negative else _split_parts(text):
        variants = _expand_schedule(piece, steps, base_steps)
        parts.append(
            Part(tuple(Variant(until, at.text, (Clause(tuple(spans(at))),)) for until, at in variants), weight)
        )
    return text.text, tuple(parts), tuple(networks)


def strip_comments(text: SourceText) -> SourceText:
    """Remove comments: `#` hides the rest of its line."""
    for pattern in (_WHOLE_LINE_COMMENT, _COMMENT) if "#" in text.text else ():
        kept, start = [], 0
        for match in pattern.finditer(text.text):
            kept += [text.slice(start, match.start()), SourceText("\n", text.places[match.end() - 1 : match.end()])]
            start = match.end()
        text = SourceText.join([*kept, text.slice(start)])
    return text


def _extract_networks(text: SourceText) -> tuple[SourceText, list[Network]]:
    """Extract `<kind:name:args>`; a network ends at the first `>`."""
    kept, networks, start = [], [], 0
    match = _NETWORK.search(text.text)
    while match:
        end = text.text.find(">", match.end())
        if end < 0:
            break
        if end > match.end():
            kept.append(text.slice(start, match.start()))
            items = [item.split("=", 2) for item in text.text[match.end() : end].split(":")]
            args = tuple("=".join(item) for item in items if len(item) != 2)
            options = dict(item for item in items if len(item) == 2)
            place = (text.places[match.start()], text.places[end] + 1)
            networks.append(Network(match[1], args[0] if args else "", args[1:], options, *place))
            start = end + 1
        match = _NETWORK.search(text.text, max(start, match.end()))
    return SourceText.join([*kept, text.slice(start)]), networks


def _split_parts(text: SourceText) -> Iterator[tuple[SourceText, float]]:
    """Split a text at AND; each part has the weight at its end (`a cat :1.2`), even if there is no AND."""
    ends = [match.span() for match in _AND.finditer(text.text)]
    for start, end in zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text.text)], strict=True):
        part = text.text[start:end].rstrip()
        head, colon, tail = part.rpartition(":")
        if colon and _PART_WEIGHT.fullmatch(tail.lstrip()):
            yield text.slice(start, start + len(head.rstrip())), float(tail)
        else:
            yield text.slice(start, start + len(part)), 1.0


class _Switch(NamedTuple):
    """`[before:after:when]`."""

    before: list[_Node]
    after: list[_Node]
    when: int


class _Cycle(NamedTuple):
    """`[a|b|c]`."""

    options: list[list[_Node]]


_Node = SourceText | _Switch | _Cycle | list["_Node"]


class _Frame(NamedTuple):
    """An open bracket, the fields between its separators, and the separators."""

    bracket: SourceText
    fields: list[list[_Node]]
    separators: list[SourceText]


def _expand_schedule(text: SourceText, steps: int, base_steps: int | None) -> list[tuple[int, SourceText]]:
    """Return the texts of a run with the last step of each, from 1 to `steps`.

    A bracket is prompt editing only if its whole content is well-formed: brackets are closed and matched, round ones
    have at most one colon, and square ones have only bars, or one or two colons before a number. Otherwise it is plain
    text, and so is every bracket around it. A bar outside of `[a|b]`, or a backslash before nothing or a line break,
    makes all of it plain text.
    """
    if "[" not in text.text:
        return [(steps, text)]
    root: list[_Node] = []
    frames: list[_Frame] = []
    ends = {steps}
    for match in _SCHEDULE_TOKEN.finditer(text.text):
        token, piece = match[0], text.slice(*match.span())
        if token == "\\" or (token == "|" and not frames):
            return [(steps, text)]
        if token in "([":
            frames.append(_Frame(piece, [[]], []))
        elif token in ":|" and frames:
            frames[-1].separators.append(piece)
            frames[-1].fields.append([])
        elif token not in ")]":
            (frames[-1].fields[-1] if frames else root).append(piece)
        else:
            node = _close_bracket(frames[-1], piece, steps, base_steps, ends) if frames else None
            if node is not None:
                frames.pop()
                (frames[-1].fields[-1] if frames else root).append(node)
            elif _give_up(frames, root):
                root.append(piece)
            else:
                return [(steps, text)]
    if not _give_up(frames, root):
        return [(steps, text)]
    return [(end, _text_at(root, end)) for end in sorted(ends)]


def _close_bracket(
    frame: _Frame, bracket: SourceText, steps: int, base_steps: int | None, ends: set[int]
) -> _Node | None:
    """Return the node of a closed bracket, or None if it is malformed, and add the steps of its changes to `ends`."""
    separators = "".join(separator.text for separator in frame.separators)
    if frame.bracket.text + bracket.text == "[]":
        last = frame.fields[-1]
        if separators in (":", "::"):
            number = _STEP.fullmatch(last[0].text) if len(last) == 1 and isinstance(last[0], SourceText) else None
            if number is None:
                return None
            when = _parse_step(number[1], steps, base_steps)
            if when >= 1:
                ends.add(when)
            return _Switch(frame.fields[0] if separators == "::" else [], frame.fields[-2], when)
        if separators and set(separators) == {"|"}:
            ends.update(range(1, steps + 1))
            return _Cycle(frame.fields)
    elif separators == ":" and frame.bracket.text + bracket.text == "()":
        return [frame.bracket, *frame.fields[0], frame.separators[0], *frame.fields[1], bracket]
    if not separators and frame.bracket.text + bracket.text in ("()", "[]"):
        return [frame.bracket, frame.fields[0], bracket]
    return None


def _give_up(frames: list[_Frame], root: list[_Node]) -> bool:
    """Turn the open brackets into text; return False if one of them has a bar, which cannot be text."""
    for frame in frames:
        root.append(frame.bracket)
        root.append(frame.fields[0])
        for separator, field in zip(frame.separators, frame.fields[1:], strict=True):
            if separator.text == "|":
                return False
            root.append(separator)
            root.append(field)
    frames.clear()
    return True


def _parse_step(text: str, steps: int, base_steps: int | None) -> int:
    """Convert a number to a step: with a decimal point, a fraction of the steps; a second pass continues to count."""
    value = float(text)
    if "." in text:
        value = (value - (base_steps is not None)) * steps
    elif base_steps is not None:
        value -= base_steps
    if abs(value) == float("inf"):
        raise RequestError(
            f"prompt editing has the step {text!r}; it must be a step or a fraction of the steps, as in [a:b:0.5]"
        )
    return min(steps, int(value))


def _text_at(nodes: list[_Node], step: int) -> SourceText:
    """Return the text at a step, from 1."""
    texts: list[SourceText] = []
    stack: list[_Node] = [nodes]
    while stack:
        match stack.pop():
            case SourceText() as text:
                texts.append(text)
            case _Switch(before, after, when):
                stack.append(before if step <= when else after)
            case _Cycle(options):
                stack.append(options[(step - 1) % len(options)])
            case list() as children:
                stack.extend(reversed(children))
    return SourceText.join(texts)


def write(pairs: list[tuple[str, float]]) -> str:
    """Return the text that reads as these (text, weight) pairs, whose neighbors must differ in weight.

    AND, BREAK, networks and a weight at the end that are only words are escaped by a backslash, which the grammar
    removes.
    """
    out = []
    for index, (text, weight) in enumerate(pairs):
        neighbors = pairs[max(index - 1, 0) : index] + pairs[index + 1 : index + 2]
        if (text, weight) == ("BREAK", -1.0) and [around for _, around in neighbors] == [1.0, 1.0]:
            before, after = (around for around, _ in neighbors)
            out.append("\\" if before[-1:].isspace() else " " if before else "")
            out.append("BREAK\\" if after[:1].isspace() else "BREAK ")
            continue
        text = re.sub(r"([\\()\[\]])", r"\\\1", text)
        text = re.sub(r"\b(B|A)(REAK|ND)\b", r"\1\\\2", text)
        text = re.sub(r"<(?=\w+:)", r"<\\", text)
        if weight == 1.0 and index == len(pairs) - 1:
            text = re.sub(r":(?=\s*[-+]?(\d+\.?|\d*\.\d+)\s*$)", r":\\", text)
        plain = weight == 1.0 and (text or len(pairs) == 1 or ("BREAK", -1.0) in neighbors)
        out.append(text if plain else f"({text or chr(92)}:{format_decimal(weight)})")
    return "".join(out)
