"""The grammar of Compel, which InvokeAI uses: weights behind a word or bracket, `.blend`, `.and`, `.swap`, `withLora`.

`word++` weighs 1.1 * 1.1, `word-` 0.9, `(some words)1.3` and `"some words"1.3` 1.3; nested weights multiply. What fits
no rule is a word like any other, so almost nothing is an error. Compel reads by ordered choice without ever going back,
and so does `_Reader`; it takes brackets from the last to the first, so each is read once and nothing recurses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Clause, Network, Span, Traced, decimal, number

_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r",(?=\S)")
_WORD = re.compile(r"(?:\\[()\",.+\-=]|[-+](?![ \t\r\n()\",.+\-=]|\Z)|[^ \t\n\r\v\f()\",.+\-=])+")
_FREE_WORD = re.compile(r"[^ \t\n\r\v\f]+")
_QUOTED = re.compile(r'"((?:\\"|[^"\r\n])*)"')
_SPACE_ESCAPE = re.compile(r"\\[tnrf0]")
_NUMBER = r"[+-]?(?:\d+\.\d*|\.\d+)|-?[0-9]+"
_ESCAPED = (
    r'(?<!\\)(\\*+)([()"])',
    r'(?<!\\)(\\*+)([("])',
    r'(^\\*+)([("])',
    r"()(?!)",
)  # what `_phrase` puts a backslash before
_SIGNS = re.compile(r"\++|-+")
_SIGNS_OR_NUMBER = re.compile(rf"\++|-+|{_NUMBER}")
_ATTEND = re.compile(rf"[ \t\r\n]*\.attend[ \t\r\n]*\([ \t\r\n]*((?>\++|-+|{_NUMBER}))[ \t\r\n]*\)")
_SWAP = re.compile(r"\.swap[ \t\r\n]*\(")
_LORA = re.compile(
    rf"(?:useLora|withLora)[ \t\r\n]*\([ \t\r\n]*([\w-]+)(?:[ \t\r\n]*,[ \t\r\n]*({_NUMBER}))?[ \t\r\n]*\)", re.ASCII
)
_OPTION = re.compile(rf"[ \t\r\n]*(?:([\w-]+)[ \t\r\n]*=[ \t\r\n]*(?:{_NUMBER}|[\w-]+)|({_NUMBER})|([\w-]+))", re.ASCII)
_JOIN = re.compile(r"[ \t\r\n]*\)[ \t\r\n]*\.(and|add|blend)[ \t\r\n]*\(")


class _Weighted(NamedTuple):
    nodes: list[_Node]
    weight: float


class _Swap(NamedTuple):
    """`a.swap(b)`. Compel encodes the original; what it makes of the edit never reaches the picture."""

    original: list[_Node]
    edited: list[_Node]


_Node = Traced | Network | _Weighted | _Swap | list["_Node"]
_Found = tuple[list["_Node"], int] | None  # what was read, and where it ends; None if the rule does not fit


def read(source: Traced) -> tuple[tuple[Clause, ...], str, tuple[Network, ...]]:
    """The clauses, how they are joined (`Variant.join`), and the networks."""
    text = _with_spaces(source)
    if not text.text.strip():
        return (Clause((Span(""),)),), "concat", ()
    reader = _Reader(text)
    texts, weights, join = reader.joined() or ([reader.whole()], [1.0], "concat")
    networks: list[Network] = []
    clauses = []
    for nodes, weight in zip(texts, weights, strict=True):
        fragments, found = _flatten(nodes, blended=join != "concat")
        networks += found
        if fragments:
            clauses.append(Clause(tuple(_fused(fragments)), weight))
    if join != "concat" and len(clauses) != len(texts):
        raise RequestError("prompt has a .blend() with an empty text in it; it must have words in each")
    return tuple(clauses) or (Clause((Span(""),)),), join, tuple(networks)


def _with_spaces(text: Traced) -> Traced:
    """A space behind each comma that has none; of two commas side by side, only the first gets one."""
    parts, start, last = [], 0, -2
    for match in _COMMA.finditer(text.text):
        if match.start() != last + 1:
            parts += [text.cut(start, match.end()), Traced(" ", text.places[match.start() : match.end()])]
            start, last = match.end(), match.start()
    return Traced.join([*parts, text.cut(start)]) if parts else text


class _Reader:
    """The rules of the grammar. Each takes a position in the text, and most skip the space there first."""

    def __init__(self, text: Traced) -> None:
        self.source, self.text = text, text.text
        self.quoted: dict[int, _Found] = {}
        self.brackets: dict[int, _Found] = {}
        self.edits: dict[int, _Found] = {}
        swaps = {match.end() - 1 for match in _SWAP.finditer(text.text)}
        position = self.text.rfind("(")
        while position >= 0:
            if self.text[position - 1 : position] != "\\":  # an escaped one is never read as a bracket
                self.brackets[position] = self._bracket(position)
            if position in swaps:
                self.edits[position] = self._edit(position)
            position = self.text.rfind("(", 0, position)

    def skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        return match.end() if match else position

    def whole(self) -> list[_Node]:
        """The text as one prompt."""
        nodes, end = self.prompt(0)
        if end < len(self.text):
            raise RequestError(
                f"prompt has {self.text[end]!r} at character {end}, which Compel cannot read; leave it out"
            )
        return nodes

    def joined(self) -> tuple[list[list[_Node]], list[float], str] | None:
        """`("a", "b").and(1, 0.5)` or `("a", "b").blend(1, 0.5)` in place of a prompt."""
        networks, start = self._networks(0)
        found = self._texts(start)
        match = _JOIN.match(self.text, found[1]) if found else None
        if not (found and match) or (match[1] != "blend" and networks):
            return None
        options, end = self._options(match.end())
        end = self.skip(end)
        if self.text[end : end + 1] != ")":
            return None
        texts, join = found[0], "concat"
        if match[1] == "blend":
            join = "blend"
            if options and options[-1] == "no_normalize":
                options, join = options[:-1], "blend_no_normalize"
            more, end = self._networks(end + 1)
            if end < len(self.text):
                raise RequestError(f"prompt goes on after .blend(): {self.text[end : end + 20]!r}; it must end there")
            networks += more
        weights = [number(option, self.text[match.start() : end]) for option in options] or [1.0] * len(texts)
        if len(weights) != len(texts):
            raise RequestError(
                f"prompt has {len(texts)} texts and {len(weights)} weights in .{match[1]}(); it must have as many"
            )
        return [[*networks, *texts[0]], *texts[1:]], weights, join

    def _networks(self, position: int) -> tuple[list[_Node], int]:
        nodes: list[_Node] = []
        position = self.skip(position)
        while match := _LORA.match(self.text, position):
            nodes.append(self._network(match))
            position = self.skip(match.end())
        return nodes, position

    def _texts(self, position: int) -> tuple[list[list[_Node]], int] | None:
        """`("a", (b c), d` up to the bracket that closes it."""
        texts: list[list[_Node]] = []
        while self.text[position : position + 1] == ("," if texts else "("):
            position = self.skip(position + 1)
            found = self._target(position) or self._quoted_prompt(position)
            if found is None:
                return None
            texts.append(found[0])
            position = self.skip(found[1])
        return (texts, position) if texts else None

    def _options(self, position: int) -> tuple[list[str], int]:
        """`1, 0.5, name=value, flag`: of each its name or number."""
        options: list[str] = []
        match = _OPTION.match(self.text, position)
        while match:
            options.append(match[1] or match[2] or match[3])
            position = match.end()
            comma = self.skip(position)
            match = _OPTION.match(self.text, comma + 1) if self.text[comma : comma + 1] == "," else None
        return options, position

    def prompt(self, position: int) -> tuple[list[_Node], int]:
        """A whole prompt, in which what fits nothing else is a word up to the next space."""
        nodes: list[_Node] = []
        while True:
            position = self.skip(position)
            found = self._element(position, bare_words=False)
            if found is None:
                match = _FREE_WORD.match(self.text, position)
                if match is None:
                    return nodes, position
                found = [self.source.cut(*match.span())], match.end()
            nodes += found[0]
            position = found[1]

    def _fragments(self, position: int, punctuation: bool) -> tuple[list[_Node], int]:
        """What may stand in brackets: as a prompt, but nothing that has a meaning may stand there without it."""
        nodes: list[_Node] = []
        while True:
            position = self.skip(position)
            found = self._element(position, bare_words=True)
            if found is None and punctuation and self.text[position : position + 1] in (",", "."):
                found = [self.source.cut(position, position + 1)], position + 1
            if found is None:
                return nodes, position
            nodes += found[0]
            position = found[1]

    def _element(self, position: int, bare_words: bool) -> _Found:
        """A network, or a target with or without an operator."""
        if match := _LORA.match(self.text, position):
            return [self._network(match)], match.end()
        target = self._target(position)
        if target is None:
            return None
        nodes, end = target
        is_word = self.text[position] not in '("'
        if (match := _SWAP.match(self.text, self.skip(end))) and (edit := self.edits[match.end() - 1]):
            return [_Swap(nodes, edit[0])], edit[1]
        if match := _ATTEND.match(self.text, end):
            return [_Weighted(nodes, _weight(match[1]))], match.end()
        if match := (_SIGNS if is_word else _SIGNS_OR_NUMBER).match(self.text, end):
            return [_Weighted(nodes, _weight(match[0]))], match.end()
        return None if is_word and not bare_words else target

    def _target(self, position: int) -> _Found:
        """What an operator may follow: words in quotes or brackets, or a word."""
        match self.text[position : position + 1]:
            case '"':
                return self._quoted(position)
            case "(":
                return self.brackets.get(position)
        match = _WORD.match(self.text, position)
        return ([self.source.cut(*match.span())], match.end()) if match else None

    def _bracket(self, position: int) -> _Found:
        nodes, end = self._fragments(position + 1, punctuation=True)
        return ([nodes], end + 1) if self.text[end : end + 1] == ")" else None

    def _edit(self, position: int) -> _Found:
        """What stands in the brackets of a swap: words without punctuation, and options."""
        nodes, end = self._fragments(position + 1, punctuation=False)
        if self.text[end : end + 1] == ",":
            end = self.skip(self._options(end + 1)[1])
        return ([nodes], end + 1) if self.text[end : end + 1] == ")" else None

    def _quoted(self, position: int) -> _Found:
        if position not in self.quoted:
            self.quoted[position] = self._read_quoted(position, as_prompt=False)
        return self.quoted[position]

    def _quoted_prompt(self, position: int) -> _Found:
        return self._read_quoted(position, as_prompt=True)

    def _read_quoted(self, position: int, as_prompt: bool) -> _Found:
        match = _QUOTED.match(self.text, position)
        if match is None:
            return None
        content = _without_space_escapes(self.source.cut(*match.span(1)))
        if not content.text.strip():
            return [Traced("", ())], match.end()
        inner = _Reader(content)
        nodes, end = inner.prompt(0) if as_prompt else inner._fragments(0, punctuation=True)
        return ([nodes], match.end()) if end == len(content.text) else None

    def _network(self, match: re.Match[str]) -> Network:
        places = self.source.places
        start, end = places[match.start()], places[match.end() - 1] + 1
        return Network("lora", match[1], (match[2],) if match[2] else (), {}, start, end)


def _without_space_escapes(text: Traced) -> Traced:
    r"""In quotes \t and \n are a tab and a new line, which ends no quotes when it is written so."""
    parts, start = [], 0
    for match in _SPACE_ESCAPE.finditer(text.text):
        space = match[0].translate(str.maketrans("tnrf0", "\t\n\r\f\0"))[1]
        parts += [text.cut(start, match.start()), Traced(space, text.places[match.start() : match.start() + 1])]
        start = match.end()
    return Traced.join([*parts, text.cut(start)]) if parts else text


def _weight(operator: str) -> float:
    if operator[0] not in "+-":
        return float(operator)
    try:
        return (1.1 if operator[0] == "+" else 0.9) ** len(operator)
    except OverflowError:
        raise RequestError(
            f"prompt has {len(operator)} plus signs in a row; it must have a weight that is finite"
        ) from None


class _Fragment(NamedTuple):
    text: Traced
    weight: float
    swaps: int  # how often a swap began or ended before it: nothing is joined across


def _flatten(nodes: list[_Node], blended: bool) -> tuple[list[_Fragment], list[Network]]:
    """The fragments in their order, weights multiplied from the outermost in, and the networks."""
    fragments: list[_Fragment] = []
    networks: list[Network] = []
    swaps = 0
    stack: list[tuple[_Node | int, float, bool]] = [(nodes, 1.0, True)]  # node, scale, whether its words count
    while stack:
        node, scale, spoken = stack.pop()
        match node:
            case Traced():
                fragments += [_Fragment(node, scale, swaps)] if spoken else []
            case Network():
                networks.append(node)
            case _Weighted(children, weight):
                stack.append((children, scale * weight, spoken))
            case _Swap(original, edited):
                if blended:
                    raise RequestError(
                        "prompt has a .swap() in a .blend(), which Compel cannot do; leave one of them out"
                    )
                swaps += 1
                stack += [(edited, scale, False), (len(fragments), scale, spoken), (original, scale, spoken)]
            case int():  # the end of a swap's original, with the number of fragments before it
                if spoken and node == len(fragments):
                    fragments.append(_Fragment(Traced("", ()), 1.0, swaps))
                swaps += 1
            case list():
                stack.extend((child, scale, spoken) for child in reversed(node))
    return fragments, networks


def _fused(fragments: list[_Fragment]) -> Iterator[Span]:
    """Neighbours of one weight, joined by a space."""
    start = 0
    while start < len(fragments):
        end = start + 1
        while end < len(fragments) and fragments[end][1:] == fragments[start][1:]:
            end += 1
        parts: list[Traced] = []
        for index in range(start, end):
            text = _unescaped(fragments[index].text, _passes(index - start, end - start))
            parts += (
                [Traced(" ", (parts[-1] if parts[-1].text else text).places[-1:] or (0,)), text] if parts else [text]
            )
        joined = Traced.join(parts)
        yield Span(joined.text, fragments[start].weight, joined.places)
        start = end


def _passes(index: int, count: int) -> int:
    """How often Compel undoes the escapes of a fragment: twice, and each time that something is joined behind it."""
    return 2 + count - max(index, 1)


def _unescaped(text: Traced, passes: int) -> Traced:
    """Each pass takes one backslash from before a bracket or a quote, as long as there is one."""
    if "\\" not in text.text:
        return text
    parts, start = [], 0
    for match in re.finditer(r"(?<!\\)(\\++)[()\"]", text.text):
        parts.append(text.cut(start, match.end(1) - min(passes, len(match[1]))))
        start = match.end(1)
    return Traced.join([*parts, text.cut(start)])


def write(pairs: list[tuple[str, float]]) -> str:
    """The text that reads as these (text, weight) pairs, as far as Compel can say them.

    It would join two neighbours of one weight; so one of them is swapped with nothing, which changes nothing. Where
    that cannot be said either, the pairs are the texts of an `.and()`.
    """
    swapped = [False] * len(pairs)
    for index, (_, weight) in enumerate(pairs):
        if weight < 0:
            raise RequestError(f"a weight of {weight} cannot be written in compel; it must be 0 or more")
        if index and weight == pairs[index - 1][1] and not swapped[index - 1]:
            choice = next((i for i in (index, index - 1) if fits_brackets(pairs[i][0])), None)
            if choice is None:
                cuts = [0, *(i for i in range(1, len(pairs)) if pairs[i][1] == pairs[i - 1][1]), len(pairs)]
                return several([write(pairs[start:end]) for start, end in pairwise(cuts)], [])
            swapped[choice] = True
    for spellings in (_ESCAPED, _ESCAPED[::-1]):
        result = _phrases(pairs, swapped, spellings)
        if [(span.text, span.weight) for clause in read(Traced.of(result))[0] for span in clause.spans] == pairs:
            break
    return result


def _phrases(pairs: list[tuple[str, float]], swapped: list[bool], spellings: tuple[str, ...]) -> str:
    phrases = []
    for (text, weight), swap in zip(pairs, swapped, strict=True):
        phrase = _phrase(text, spellings if weight == 1.0 and not swap else ())
        if weight != 1.0 or swap:
            # no backslash may stand before a bracket that closes; but the last escaped quote of a line closes quotes
            quoted = phrase.endswith("\\")
            phrase = (f'"{phrase}"' if quoted else f"({phrase})") + (".swap()" if swap else "")
            if weight != 1.0:
                phrase = (f"({phrase})" if swap else phrase) + decimal(weight)
            phrase += "\n" if quoted else ""
        phrases.append(phrase)
    return re.sub(r", ,(?=\S)", ",,", " ".join(phrases))


def several(texts: list[str], weights: list[float], join: str = "concat") -> str:
    """Several prompts, encoded apart and joined as `Variant.join` says: `("a", "b").and()`."""
    quoted = ", ".join('"' + re.sub(r'(?<!\\)"', r"\\\"", text) + '"' for text in texts)
    options = [*map(decimal, weights), *(["no_normalize"] if join == "blend_no_normalize" else [])]
    return f"({quoted}).{'and' if join == 'concat' else 'blend'}({', '.join(options)})"


def fits_brackets(text: str) -> bool:
    """Whether all words of a text can stand in brackets, where what has a meaning cannot stand without it."""
    found = _Reader(Traced.of(f"({_phrase(text)})")).brackets.get(0)
    if found is None:
        return False
    fragments, networks = _flatten(found[0], blended=False)
    return not networks and [(span.text, span.weight) for span in _fused(fragments)] == [(text, 1.0)]


def _phrase(text: str, spellings: tuple[str, ...] = ()) -> str:
    r"""The words of a text with a backslash before each bracket and quote, and more before one that has one.

    Outside of brackets, where a word may hold anything, it gets the first of the `spellings` that reads as itself.
    """
    words = text.split(" ")
    for index, word in enumerate(words):

        def escape(match: re.Match[str], passes: int = _passes(index, len(words))) -> str:
            return match[1] + "\\" * (passes if match[1] else 1) + match[2]

        spelled = [re.sub(characters, escape, word) for characters in spellings or _ESCAPED[:1]]
        fitting = (each for each in spelled if not spellings or _is_free_word(each))
        words[index] = next(fitting, word) or '""'
    return " ".join(words)


def _is_free_word(text: str) -> bool:
    return _Reader(Traced.of(text)).prompt(0)[0] == [Traced.of(text)]


def is_name(text: str) -> bool:
    """Whether withLora() can name it."""
    return re.fullmatch(r"[\w-]+", text, re.ASCII) is not None
