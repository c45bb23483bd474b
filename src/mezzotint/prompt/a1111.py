"""The grammar of A1111's web UI: emphasis, BREAK, prompt editing, alternation, AND, networks, comments.

`(a)` weighs 1.1, `[a]` 1/1.1, `(a:1.3)` 1.3, and all brackets around a word multiply. `[from:to:when]` and `[a|b]`
change the text while it is drawn. The passes follow each other as they do there: comments go, networks are cut out,
the rest is split at AND, each part becomes one text for each step, and each of those is weighted (`spans`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Clause, Network, Part, Span, Traced, Variant, decimal, number

_EXACT = 32  # brackets around a word whose factors are multiplied in A1111's own order; beyond it rounding may differ

_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_NETWORK = re.compile(r"<(\w+):")
_WHOLE_LINE_COMMENT = re.compile(r"(?:^|\n)#[^\n]*(?:\n|$)")
_COMMENT = re.compile(r"#[^\n]*(?:\n|$)")
_SCHEDULE_TOKEN = re.compile(r"(?:[^\\()\[\]:|]|\\.)+|[()\[\]:|]|\\")
_STEP = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


def spans(text: Traced) -> list[Span]:
    """The last pass: emphasis and BREAK. Neighbours of one weight are joined; no text is one empty span."""
    pieces: list[tuple[Traced, float, int]] = []  # text, 1 or -1 (a BREAK), how many of the events came before it
    events = array("q")  # brackets by number: where one is met first it opens, where it is met again it closes
    square, factor, closed = bytearray(), array("d"), array("q")  # of each bracket; `closed`: the how manieth to close
    opened: tuple[list[int], list[int]] = ([], [])  # round, square
    closings = 0

    def close(bracket: int, by: float) -> None:
        nonlocal closings
        factor[bracket], closed[bracket] = by, closings
        closings += 1

    for match in _TOKEN.finditer(text.text):
        token, start, end = match[0], match.start(), match.end()
        if token[0] == "\\":
            pieces.append((text.cut(start + 1, end), 1.0, len(events)))
        elif token in "([":
            events.append(len(square))
            opened[token == "["].append(len(square))
            square.append(token == "[")
            factor.append(1.0)
            closed.append(0)
        elif match[1] and opened[0]:
            events.append(opened[0].pop())
            close(events[-1], number(match[1], token))
        elif token in ")]" and opened[token == "]"]:
            events.append(opened[token == "]"].pop())
            close(events[-1], 1.1 if token == ")" else 1 / 1.1)
        else:
            pieces.extend((piece, sign, len(events)) for piece, sign in _breaks(text.cut(start, end)))
    for bracket in opened[0]:
        close(bracket, 1.1)
    for bracket in opened[1]:
        close(bracket, 1 / 1.1)

    result: list[tuple[list[Traced], float]] = []
    around: tuple[list[int], list[int]] = ([], [])  # the brackets around a piece, round and square
    product = ([1.0], [1.0])  # of their factors, from the outermost in
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
            if len(around[0]) + len(around[1]) <= _EXACT:
                scale = 1.0
                for bracket in sorted(around[0] + around[1], key=closed.__getitem__):
                    scale *= factor[bracket]
            else:
                scale = product[0][-1] * product[1][-1]
        if result and result[-1][1] == sign * scale:
            result[-1][0].append(piece)
        else:
            result.append(([piece], sign * scale))
    joined = [(Traced.join(parts), weight) for parts, weight in result]
    return [Span(part.text, weight, part.places) for part, weight in joined] or [Span("")]


def _breaks(text: Traced) -> Iterator[tuple[Traced, float]]:
    """A text split at the word BREAK, with the space around it eaten: (text, 1) and (BREAK, -1) in turn."""
    start = 0
    for match in _BREAK.finditer(text.text):
        yield text.cut(start, start + len(text.text[start : match.start()].rstrip())), 1.0
        yield text.cut(*match.span()), -1.0
        start = len(text.text) - len(text.text[match.end() :].lstrip())
    yield text.cut(start), 1.0


def read(
    source: Traced, steps: int, negative: bool, base_steps: int | None
) -> tuple[str, tuple[Part, ...], tuple[Network, ...]]:
    """All passes: the text without comments and networks, its parts, and the networks."""
    text = without_comments(source)
    networks: list[Network] = []
    if not negative:
        text, networks = _without_networks(text)
    parts = []
    for piece, weight in [(text, 1.0)] if negative else _parts(text):
        variants = _schedule(piece, steps, base_steps)
        parts.append(
            Part(tuple(Variant(until, at.text, (Clause(tuple(spans(at))),)) for until, at in variants), weight)
        )
    return text.text, tuple(parts), tuple(networks)


def without_comments(text: Traced) -> Traced:
    """`#` hides the rest of its line."""
    for pattern in (_WHOLE_LINE_COMMENT, _COMMENT) if "#" in text.text else ():
        kept, start = [], 0
        for match in pattern.finditer(text.text):
            kept += [text.cut(start, match.start()), Traced("\n", text.places[match.end() - 1 : match.end()])]
            start = match.end()
        text = Traced.join([*kept, text.cut(start)])
    return text


def _without_networks(text: Traced) -> tuple[Traced, list[Network]]:
    """`<kind:name:args>` cut out, anything but `>` in it."""
    kept, networks, start = [], [], 0
    match = _NETWORK.search(text.text)
    while match:
        end = text.text.find(">", match.end())
        if end < 0:
            break
        if end > match.end():
            kept.append(text.cut(start, match.start()))
            items = [item.split("=", 2) for item in text.text[match.end() : end].split(":")]
            args = tuple("=".join(item) for item in items if len(item) != 2)
            options = dict(item for item in items if len(item) == 2)
            place = (text.places[match.start()], text.places[end] + 1)
            networks.append(Network(match[1], args[0] if args else "", args[1:], options, *place))
            start = end + 1
        match = _NETWORK.search(text.text, max(start, match.end()))
    return Traced.join([*kept, text.cut(start)]), networks


def _parts(text: Traced) -> Iterator[tuple[Traced, float]]:
    """The text split at AND, each part with the weight that ends it (`a cat :1.2`), also where there is no AND."""
    ends = [match.span() for match in _AND.finditer(text.text)]
    for start, end in zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text.text)], strict=True):
        part = text.text[start:end].rstrip()
        head, colon, tail = part.rpartition(":")
        if colon and _PART_WEIGHT.fullmatch(tail.lstrip()):
            yield text.cut(start, start + len(head.rstrip())), float(tail)
        else:
            yield text.cut(start, start + len(part)), 1.0


class _Switch(NamedTuple):
    """`[before:after:when]`"""

    before: list[_Node]
    after: list[_Node]
    when: int


class _Cycle(NamedTuple):
    """`[a|b|c]`"""

    options: list[list[_Node]]


_Node = Traced | _Switch | _Cycle | list["_Node"]


class _Frame(NamedTuple):
    """A bracket that is still open: itself, what stands between its separators, and the separators."""

    bracket: Traced
    fields: list[list[_Node]]
    separators: list[Traced]


def _schedule(text: Traced, steps: int, base_steps: int | None) -> list[tuple[int, Traced]]:
    """The texts of a run and the last step of each, from 1 to `steps`.

    A bracket counts only if all that it holds is sound: its brackets closed and in pairs, at most one colon in a round
    one, in a square one bars alone, or one or two colons before a number. Any other is text, and so is every bracket
    around it. A bar outside of `[a|b]`, or a backslash before nothing or a line break, makes all of it text.
    """
    if "[" not in text.text:
        return [(steps, text)]
    root: list[_Node] = []
    frames: list[_Frame] = []
    ends = {steps}
    for match in _SCHEDULE_TOKEN.finditer(text.text):
        token, piece = match[0], text.cut(*match.span())
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
            node = _close(frames[-1], piece, steps, base_steps, ends) if frames else None
            if node is not None:
                frames.pop()
                (frames[-1].fields[-1] if frames else root).append(node)
            elif _give_up(frames, root):
                root.append(piece)
            else:
                return [(steps, text)]
    if not _give_up(frames, root):
        return [(steps, text)]
    return [(end, _at(root, end)) for end in sorted(ends)]


def _close(frame: _Frame, bracket: Traced, steps: int, base_steps: int | None, ends: set[int]) -> _Node | None:
    """What a closed bracket means; None if it means nothing, or does not fit. Adds the steps where the text changes."""
    separators = "".join(separator.text for separator in frame.separators)
    if frame.bracket.text + bracket.text == "[]":
        last = frame.fields[-1]
        if separators in (":", "::"):
            number = _STEP.fullmatch(last[0].text) if len(last) == 1 and isinstance(last[0], Traced) else None
            if number is None:
                return None
            when = _step(number[1], steps, base_steps)
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
    """Makes text of the brackets that are open; False if a bar stands in one, which cannot be text."""
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


def _step(text: str, steps: int, base_steps: int | None) -> int:
    """A number with a dot is a fraction of the steps, one without a step; in a second pass both go on counting."""
    value = float(text)
    if "." in text:
        value = (value - (base_steps is not None)) * steps
    elif base_steps is not None:
        value -= base_steps
    if abs(value) == float("inf"):
        raise RequestError(f"prompt changes at {text!r}; it must be a step or a fraction of the steps, as in [a:b:0.5]")
    return min(steps, int(value))


def _at(nodes: list[_Node], step: int) -> Traced:
    """The text at a step, from 1."""
    texts: list[Traced] = []
    stack: list[_Node] = [nodes]
    while stack:
        match stack.pop():
            case Traced() as text:
                texts.append(text)
            case _Switch(before, after, when):
                stack.append(before if step <= when else after)
            case _Cycle(options):
                stack.append(options[(step - 1) % len(options)])
            case list() as children:
                stack.extend(reversed(children))
    return Traced.join(texts)


def write(pairs: list[tuple[str, float]]) -> str:
    """The text that reads as these (text, weight) pairs, in which neighbours differ in weight; AND, BREAK, networks and
    a weight at the end that are only words are kept from meaning more by a backslash, which the grammar drops.
    """
    out = []
    for index, (text, weight) in enumerate(pairs):
        neighbours = pairs[max(index - 1, 0) : index] + pairs[index + 1 : index + 2]
        if (text, weight) == ("BREAK", -1.0) and [around for _, around in neighbours] == [1.0, 1.0]:
            before, after = (around for around, _ in neighbours)
            out.append("\\" if before[-1:].isspace() else " " if before else "")
            out.append("BREAK\\" if after[:1].isspace() else "BREAK ")
            continue
        text = re.sub(r"([\\()\[\]])", r"\\\1", text)
        text = re.sub(r"\b(B|A)(REAK|ND)\b", r"\1\\\2", text)
        text = re.sub(r"<(?=\w+:)", r"<\\", text)
        if weight == 1.0 and index == len(pairs) - 1:
            text = re.sub(r":(?=\s*[-+]?(\d+\.?|\d*\.\d+)\s*$)", r":\\", text)
        plain = weight == 1.0 and (text or len(pairs) == 1 or ("BREAK", -1.0) in neighbours)
        out.append(text if plain else f"({text or chr(92)}:{decimal(weight)})")
    return "".join(out)
