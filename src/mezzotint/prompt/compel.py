"""The grammar of Compel, used by InvokeAI: weights after a word or bracket, `.blend`, `.and`, `.swap`, `withLora`.

`word++` weighs 1.1 * 1.1, `word-` 0.9, `(some words)1.3` and `"some words"1.3` 1.3; nested weights multiply. What fits
no rule is an ordinary word, so almost nothing is an error. Compel's grammar uses ordered choice without backtracking,
and so does `_Parser`; it parses brackets from the last to the first, so that each is read once without recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.prompt.pieces import Clause, Network, SourceText, Span, format_decimal, parse_number

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
)  # what `_escape_phrase` escapes
_SIGNS = re.compile(r"\++|-+")
_SIGNS_OR_NUMBER = re.compile(rf"\++|-+|{_NUMBER}")
_ATTEND = re.compile(rf"[ \t\r\n]*\.attend[ \t\r\n]*\([ \t\r\n]*((?>\++|-+|{_NUMBER}))[ \t\r\n]*\)")
_SWAP = re.compile(r"\.swap[ \t\r\n]*\(")
_LORA = re.compile(
    rf"(?:useLora|withLora)[ \t\r\n]*\([ \t\r\n]*([\w-]+)(?:[ \t\r\n]*,[ \t\r\n]*({_NUMBER}))?[ \t\r\n]*\)", re.ASCII
)
_OPTION = re.compile(rf"[ \t\r\n]*(?:([\w-]+)[ \t\r\n]*=[ \t\r\n]*(?:{_NUMBER}|[\w-]+)|({_NUMBER})|([\w-]+))", re.ASCII)
_JOIN = re.compile(r"[ \t\r\n]*\)[ \t\r\n]*\.(and|add|blend)[ \t\r\n]*\(")


class _WeightedNode(NamedTuple):
    nodes: list[_Node]
    weight: float


class _SwapNode(NamedTuple):
    """`a.swap(b)`. Compel encodes only the original; the edited text has no effect on the picture."""

    original: list[_Node]
    edited: list[_Node]


_Node = SourceText | Network | _WeightedNode | _SwapNode | list["_Node"]
_Parsed = tuple[list["_Node"], int] | None  # nodes and where they end; None if the rule does not match


def read(source: SourceText) -> tuple[tuple[Clause, ...], str, tuple[Network, ...]]:
    """Return the clauses, how they are combined (`Variant.join`), and the networks."""
    text = _add_comma_spaces(source)
    if not text.text.strip():
        return (Clause((Span(""),)),), "concat", ()
    parser = _Parser(text)
    texts, weights, join = parser.parse_joined() or ([parser.parse_whole()], [1.0], "concat")
    networks: list[Network] = []
    clauses = []
    for nodes, weight in zip(texts, weights, strict=True):
        fragments, found = _flatten(nodes, in_blend=join != "concat")
        networks += found
        if fragments:
            clauses.append(Clause(tuple(_merge_fragments(fragments)), weight))
    if join != "concat" and len(clauses) != len(texts):
        raise RequestError("prompt has an empty text in .blend(); each text must have words")
    return tuple(clauses) or (Clause((Span(""),)),), join, tuple(networks)


def _add_comma_spaces(text: SourceText) -> SourceText:
    """Insert a space after each comma that has none; of two adjacent commas, only after the first."""
    parts, start, last = [], 0, -2
    for match in _COMMA.finditer(text.text):
        if match.start() != last + 1:
            parts += [text.slice(start, match.end()), SourceText(" ", text.places[match.start() : match.end()])]
            start, last = match.end(), match.start()
    return SourceText.join([*parts, text.slice(start)]) if parts else text


class _Parser:
    """The rules of the grammar. Each takes a position in the text, and most of them skip spaces first."""

    def __init__(self, text: SourceText) -> None:
        self.source, self.text = text, text.text
        self.quoted: dict[int, _Parsed] = {}
        self.brackets: dict[int, _Parsed] = {}
        self.edits: dict[int, _Parsed] = {}
        swaps = {match.end() - 1 for match in _SWAP.finditer(text.text)}
        position = self.text.rfind("(")
        while position >= 0:
            if self.text[position - 1 : position] != "\\":  # an escaped bracket is literal
                self.brackets[position] = self._parse_bracket(position)
            if position in swaps:
                self.edits[position] = self._parse_edit(position)
            position = self.text.rfind("(", 0, position)

    def skip_space(self, position: int) -> int:
        """Return the position after the spaces."""
        match = _SPACE.match(self.text, position)
        return match.end() if match else position

    def parse_whole(self) -> list[_Node]:
        """Parse the text as one prompt."""
        nodes, end = self.parse_prompt(0)
        if end < len(self.text):
            raise RequestError(f"prompt has {self.text[end]!r} at character {end}, which Compel cannot read; remove it")
        return nodes

    def parse_joined(self) -> tuple[list[list[_Node]], list[float], str] | None:
        """Parse `("a", "b").and(1, 0.5)` or `("a", "b").blend(1, 0.5)`."""
        networks, start = self._parse_networks(0)
        found = self._parse_texts(start)
        match = _JOIN.match(self.text, found[1]) if found else None
        if not (found and match) or (match[1] != "blend" and networks):
            return None
        options, end = self._parse_options(match.end())
        end = self.skip_space(end)
        if self.text[end : end + 1] != ")":
            return None
        texts, join = found[0], "concat"
        if match[1] == "blend":
            join = "blend"
            if options and options[-1] == "no_normalize":
                options, join = options[:-1], "blend_no_normalize"
            more, end = self._parse_networks(end + 1)
            if end < len(self.text):
                raise RequestError(f"prompt has {self.text[end : end + 20]!r} after .blend(); it must end there")
            networks += more
        weights = [parse_number(option, self.text[match.start() : end]) for option in options] or [1.0] * len(texts)
        if len(weights) != len(texts):
            raise RequestError(
                f"prompt has {len(texts)} texts and {len(weights)} weights in .{match[1]}(); it must have as many"
            )
        return [[*networks, *texts[0]], *texts[1:]], weights, join

    def _parse_networks(self, position: int) -> tuple[list[_Node], int]:
        nodes: list[_Node] = []
        position = self.skip_space(position)
        while match := _LORA.match(self.text, position):
            nodes.append(self._parse_network(match))
            position = self.skip_space(match.end())
        return nodes, position

    def _parse_texts(self, position: int) -> tuple[list[list[_Node]], int] | None:
        """Parse `("a", (b c), d` up to the closing bracket."""
        texts: list[list[_Node]] = []
        while self.text[position : position + 1] == ("," if texts else "("):
            position = self.skip_space(position + 1)
            found = self._parse_target(position) or self._parse_quoted_prompt(position)
            if found is None:
                return None
            texts.append(found[0])
            position = self.skip_space(found[1])
        return (texts, position) if texts else None

    def _parse_options(self, position: int) -> tuple[list[str], int]:
        """Parse `1, 0.5, name=value, flag` to names and numbers."""
        options: list[str] = []
        match = _OPTION.match(self.text, position)
        while match:
            options.append(match[1] or match[2] or match[3])
            position = match.end()
            comma = self.skip_space(position)
            match = _OPTION.match(self.text, comma + 1) if self.text[comma : comma + 1] == "," else None
        return options, position

    def parse_prompt(self, position: int) -> tuple[list[_Node], int]:
        """Parse a whole prompt; anything that fits no other rule is a word up to the next space."""
        nodes: list[_Node] = []
        while True:
            position = self.skip_space(position)
            found = self._parse_element(position, bare_words=False)
            if found is None:
                match = _FREE_WORD.match(self.text, position)
                if match is None:
                    return nodes, position
                found = [self.source.slice(*match.span())], match.end()
            nodes += found[0]
            position = found[1]

    def _parse_fragments(self, position: int, punctuation: bool) -> tuple[list[_Node], int]:
        """Parse the content of brackets: like a prompt, but without bare operators."""
        nodes: list[_Node] = []
        while True:
            position = self.skip_space(position)
            found = self._parse_element(position, bare_words=True)
            if found is None and punctuation and self.text[position : position + 1] in (",", "."):
                found = [self.source.slice(position, position + 1)], position + 1
            if found is None:
                return nodes, position
            nodes += found[0]
            position = found[1]

    def _parse_element(self, position: int, bare_words: bool) -> _Parsed:
        """Parse a network, or a target with or without an operator."""
        if match := _LORA.match(self.text, position):
            return [self._parse_network(match)], match.end()
        target = self._parse_target(position)
        if target is None:
            return None
        nodes, end = target
        is_word = self.text[position] not in '("'
        if (match := _SWAP.match(self.text, self.skip_space(end))) and (edit := self.edits[match.end() - 1]):
            return [_SwapNode(nodes, edit[0])], edit[1]
        if match := _ATTEND.match(self.text, end):
            return [_WeightedNode(nodes, _weight(match[1]))], match.end()
        if match := (_SIGNS if is_word else _SIGNS_OR_NUMBER).match(self.text, end):
            return [_WeightedNode(nodes, _weight(match[0]))], match.end()
        return None if is_word and not bare_words else target

    def _parse_target(self, position: int) -> _Parsed:
        """Parse what an operator may follow: words in quotes or brackets, or a word."""
        match self.text[position : position + 1]:
            case '"':
                return self._parse_quoted(position)
            case "(":
                return self.brackets.get(position)
        match = _WORD.match(self.text, position)
        return ([self.source.slice(*match.span())], match.end()) if match else None

    def _parse_bracket(self, position: int) -> _Parsed:
        nodes, end = self._parse_fragments(position + 1, punctuation=True)
        return ([nodes], end + 1) if self.text[end : end + 1] == ")" else None

    def _parse_edit(self, position: int) -> _Parsed:
        """Parse the brackets of a swap: words without punctuation, and options."""
        nodes, end = self._parse_fragments(position + 1, punctuation=False)
        if self.text[end : end + 1] == ",":
            end = self.skip_space(self._parse_options(end + 1)[1])
        return ([nodes], end + 1) if self.text[end : end + 1] == ")" else None

    def _parse_quoted(self, position: int) -> _Parsed:
        if position not in self.quoted:
            self.quoted[position] = self._read_quoted(position, as_prompt=False)
        return self.quoted[position]

    def _parse_quoted_prompt(self, position: int) -> _Parsed:
        return self._read_quoted(position, as_prompt=True)

    def _read_quoted(self, position: int, as_prompt: bool) -> _Parsed:
        match = _QUOTED.match(self.text, position)
        if match is None:
            return None
        content = _replace_space_escapes(self.source.slice(*match.span(1)))
        if not content.text.strip():
            return [SourceText("", ())], match.end()
        inner = _Parser(content)
        nodes, end = inner.parse_prompt(0) if as_prompt else inner._parse_fragments(0, punctuation=True)
        return ([nodes], match.end()) if end == len(content.text) else None

    def _parse_network(self, match: re.Match[str]) -> Network:
        places = self.source.places
        start, end = places[match.start()], places[match.end() - 1] + 1
        return Network("lora", match[1], (match[2],) if match[2] else (), {}, start, end)


def _replace_space_escapes(text: SourceText) -> SourceText:
    r"""Replace \t, \n and the like in quotes by the characters they stand for."""
    parts, start = [], 0
    for match in _SPACE_ESCAPE.finditer(text.text):
        space = match[0].translate(str.maketrans("tnrf0", "\t\n\r\f\0"))[1]
        parts += [text.slice(start, match.start()), SourceText(space, text.places[match.start() : match.start() + 1])]
        start = match.end()
    return SourceText.join([*parts, text.slice(start)]) if parts else text


def _weight(operator: str) -> float:
    if operator[0] not in "+-":
        return float(operator)
    try:
        return (1.1 if operator[0] == "+" else 0.9) ** len(operator)
    except OverflowError:
        raise RequestError(f"prompt has {len(operator)} plus signs in a row; the weight must be finite") from None


class _Fragment(NamedTuple):
    text: SourceText
    weight: float
    swaps: int  # number of swap boundaries before it; fragments are not joined across them


def _flatten(nodes: list[_Node], in_blend: bool) -> tuple[list[_Fragment], list[Network]]:
    """Return the fragments in order, with weights multiplied from the outside in, and the networks."""
    fragments: list[_Fragment] = []
    networks: list[Network] = []
    swaps = 0
    stack: list[tuple[_Node | int, float, bool]] = [(nodes, 1.0, True)]  # node, scale, whether its words count
    while stack:
        node, scale, is_encoded = stack.pop()
        match node:
            case SourceText():
                fragments += [_Fragment(node, scale, swaps)] if is_encoded else []
            case Network():
                networks.append(node)
            case _WeightedNode(children, weight):
                stack.append((children, scale * weight, is_encoded))
            case _SwapNode(original, edited):
                if in_blend:
                    raise RequestError(
                        "prompt has a .swap() in a .blend(), which Compel does not support; remove one of them"
                    )
                swaps += 1
                stack += [(edited, scale, False), (len(fragments), scale, is_encoded), (original, scale, is_encoded)]
            case int():  # the end of a swap's original, with the number of fragments before it
                if is_encoded and node == len(fragments):
                    fragments.append(_Fragment(SourceText("", ()), 1.0, swaps))
                swaps += 1
            case list():
                stack.extend((child, scale, is_encoded) for child in reversed(node))
    return fragments, networks


def _merge_fragments(fragments: list[_Fragment]) -> Iterator[Span]:
    """Join adjacent fragments of one weight by a space."""
    start = 0
    while start < len(fragments):
        end = start + 1
        while end < len(fragments) and fragments[end][1:] == fragments[start][1:]:
            end += 1
        parts: list[SourceText] = []
        for index in range(start, end):
            text = _unescape(fragments[index].text, _unescape_passes(index - start, end - start))
            parts += (
                [SourceText(" ", (parts[-1] if parts[-1].text else text).places[-1:] or (0,)), text]
                if parts
                else [text]
            )
        joined = SourceText.join(parts)
        yield Span(joined.text, fragments[start].weight, joined.places)
        start = end


def _unescape_passes(index: int, count: int) -> int:
    """Return how often Compel unescapes a fragment: twice, and once more for each fragment joined after it."""
    return 2 + count - max(index, 1)


def _unescape(text: SourceText, passes: int) -> SourceText:
    """Remove backslashes before brackets and quotes, one in each pass."""
    if "\\" not in text.text:
        return text
    parts, start = [], 0
    for match in re.finditer(r"(?<!\\)(\\++)[()\"]", text.text):
        parts.append(text.slice(start, match.end(1) - min(passes, len(match[1]))))
        start = match.end(1)
    return SourceText.join([*parts, text.slice(start)])


def write(pairs: list[tuple[str, float]]) -> str:
    """Return the text that reads as these (text, weight) pairs, as far as Compel can express them.

    Compel joins neighbors of one weight; to prevent this, one of them is swapped with nothing, which has no effect.
    Where that cannot be expressed either, the pairs become the texts of an `.and()`.
    """
    needs_swap = [False] * len(pairs)
    for index, (_, weight) in enumerate(pairs):
        if weight < 0:
            raise RequestError(f"a weight of {weight} cannot be written in compel; it must be 0 or more")
        if index and weight == pairs[index - 1][1] and not needs_swap[index - 1]:
            choice = next((i for i in (index, index - 1) if fits_brackets(pairs[i][0])), None)
            if choice is None:
                cuts = [0, *(i for i in range(1, len(pairs)) if pairs[i][1] == pairs[i - 1][1]), len(pairs)]
                return write_joined([write(pairs[start:end]) for start, end in pairwise(cuts)], [])
            needs_swap[choice] = True
    for spellings in (_ESCAPED, _ESCAPED[::-1]):
        result = _write_phrases(pairs, needs_swap, spellings)
        if [
            (span.text, span.weight) for clause in read(SourceText.from_source(result))[0] for span in clause.spans
        ] == pairs:
            break
    return result


def _write_phrases(pairs: list[tuple[str, float]], needs_swap: list[bool], spellings: tuple[str, ...]) -> str:
    phrases = []
    for (text, weight), swap in zip(pairs, needs_swap, strict=True):
        phrase = _escape_phrase(text, spellings if weight == 1.0 and not swap else ())
        if weight != 1.0 or swap:
            # a backslash may not precede a closing bracket, but may precede the last quote of a line
            quoted = phrase.endswith("\\")
            phrase = (f'"{phrase}"' if quoted else f"({phrase})") + (".swap()" if swap else "")
            if weight != 1.0:
                phrase = (f"({phrase})" if swap else phrase) + format_decimal(weight)
            phrase += "\n" if quoted else ""
        phrases.append(phrase)
    return re.sub(r", ,(?=\S)", ",,", " ".join(phrases))


def write_joined(texts: list[str], weights: list[float], join: str = "concat") -> str:
    """Return several prompts, encoded separately and combined as `Variant.join` says: `("a", "b").and()`."""
    quoted = ", ".join('"' + re.sub(r'(?<!\\)"', r"\\\"", text) + '"' for text in texts)
    options = [*map(format_decimal, weights), *(["no_normalize"] if join == "blend_no_normalize" else [])]
    return f"({quoted}).{'and' if join == 'concat' else 'blend'}({', '.join(options)})"


def fits_brackets(text: str) -> bool:
    """Return whether all words of a text can be written in brackets, where bare operators are not allowed."""
    found = _Parser(SourceText.from_source(f"({_escape_phrase(text)})")).brackets.get(0)
    if found is None:
        return False
    fragments, networks = _flatten(found[0], in_blend=False)
    return not networks and [(span.text, span.weight) for span in _merge_fragments(fragments)] == [(text, 1.0)]


def _escape_phrase(text: str, spellings: tuple[str, ...] = ()) -> str:
    """Escape brackets and quotes, with more backslashes where there already are some.

    Outside of brackets, where a word may contain anything, use the first of the `spellings` that reads as the word
    itself.
    """
    words = text.split(" ")
    for index, word in enumerate(words):

        def escape(match: re.Match[str], passes: int = _unescape_passes(index, len(words))) -> str:
            return match[1] + "\\" * (passes if match[1] else 1) + match[2]

        candidates = [re.sub(characters, escape, word) for characters in spellings or _ESCAPED[:1]]
        fitting = (each for each in candidates if not spellings or _is_free_word(each))
        words[index] = next(fitting, word) or '""'
    return " ".join(words)


def _is_free_word(text: str) -> bool:
    return _Parser(SourceText.from_source(text)).parse_prompt(0)[0] == [SourceText.from_source(text)]


def is_name(text: str) -> bool:
    """Return whether withLora() accepts the name."""
    return re.fullmatch(r"[\w-]+", text, re.ASCII) is not None
