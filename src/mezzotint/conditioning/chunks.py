"""The spans of a prompt become chunks of tokens: what one window of a text encoder holds between BOS and EOS.

Each dialect has its own way to break a text that is longer than a window (75 tokens, or the model's own window - 2):

- a1111: at the end of the window, or after a comma at most 20 tokens before it; `BREAK` ends a chunk anywhere
- comfy: at the end of the window, but a segment (text of one weight, or an embedding) below 8 tokens stays whole
- compel: after the last sentence that fits, or else the last phrase, or else the last word
- plain: at the end of the window

Nothing is ever cut off. An embedding (textual inversion) stands where its trigger is written: `name`, `<name>` or
`embedding:name`; in comfy a bare name is a word like any other, as there. Its vectors stay in one chunk, but for those
of 8 and more in comfy, which ComfyUI parts like any long segment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.prompt import Span

BACKTRACK = 20  # tokens, A1111's default of comma_padding_backtrack
WHOLE = 8  # tokens, ComfyUI's max_word_length: segments below it are not parted
PLACEHOLDER = 0  # the id under a vector of an embedding, as in A1111: any but EOS
PHRASES = (".</w>", ",</w>", ";</w>", ":</w>")


class Token(NamedTuple):
    """One token of a chunk: text[start:end] of the prompt as it was written, in the span of that number.

    vector: (trigger, row) where an embedding's row stands in for the token's own.
    """

    id: int
    weight: float
    start: int
    end: int
    span: int
    vector: tuple[str, int] | None = None


Chunk = tuple[Token, ...]
Embeddings = Mapping[str, Sequence[Sized]]  # trigger -> for each text encoder its vectors
Group = list[Token]  # what belongs together: a token, an embedding, or in comfy a segment; none at all is a BREAK


def chunked(
    spans: Sequence[Span], syntax: str, tokenizer: Tokenizer, embeddings: Embeddings | None = None, encoder: int = 0
) -> list[Chunk]:
    """The chunks of one text, at least one, each of at most window - 2 tokens, for the encoder of that number.

    embeddings: trigger, in lower case and without <> -> for each encoder its vectors. Raises RequestError for an
    embedding that no window can hold, and in comfy for one that the prompt asks for and that is not there.
    """
    embeddings = embeddings or {}
    room = tokenizer.max_length - 2
    groups = [
        group for k, span in enumerate(spans) for group in _groups(span, k, syntax, tokenizer, embeddings, encoder)
    ]
    for group in groups:
        if group and group[0].vector and len(group) > room and syntax != "comfy":
            raise RequestError(
                f"the embedding {group[0].vector[0]!r} has {len(group)} vectors; a window of this text encoder holds "
                f"{room} tokens"
            )
    if syntax == "comfy":
        return [tuple(chunk) for chunk in _comfy(groups, room)]
    if syntax == "compel":
        return [tuple(chunk) for chunk in _compel([token for group in groups for token in group], room, tokenizer)]
    comma = tokenizer.vocab.get(",</w>") if syntax == "a1111" else None
    return [tuple(chunk) for chunk in _filled(groups, room, comma)]


def _groups(
    span: Span, number: int, syntax: str, tokenizer: Tokenizer, embeddings: Embeddings, encoder: int
) -> Iterator[Group]:
    if syntax == "a1111" and span.is_break:
        yield []
        return
    for start, end, name in _pieces(span.text, syntax, embeddings):
        if name is not None:
            place = span.where(start, end)
            rows = range(len(embeddings[name][encoder]))
            yield [Token(PLACEHOLDER, span.weight, *place, number, (name, row)) for row in rows]
            continue
        tokens = [
            Token(id, span.weight, *span.where(start + first, start + last), number)
            for id, first, last in tokenizer.encode_with_places(span.text[start:end])
        ]
        if syntax == "comfy":
            yield from [tokens] if tokens else []
        else:
            yield from ([token] for token in tokens)


def _pieces(text: str, syntax: str, embeddings: Embeddings) -> Iterator[tuple[int, int, str | None]]:
    """(start, end, trigger or None for words) of the pieces of a text."""
    done = 0
    for match in _triggers(syntax, tuple(embeddings)).finditer(text):
        start, end = match.span()
        name = next(group for group in match.groups() if group is not None).lower()
        if name not in embeddings:  # comfy's embedding:name, which may end in a comma or a file's suffix
            end -= len(name) - len(name := name.rstrip(","))
            name = re.sub(r"\.(safetensors|pt|bin)$", "", name)
            if name not in embeddings:
                there = ", ".join(sorted(embeddings)[:5]) or "none"
                raise RequestError(f"the prompt asks for embedding:{name[:60]}; the embeddings given are {there}")
        if done < start:
            yield done, start, None
        yield start, end, name
        done = end
    if done < len(text):
        yield done, len(text), None


@functools.lru_cache(maxsize=64)
def _triggers(syntax: str, names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds what stands for an embedding; the name is in the one group that matched."""
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
    if syntax == "comfy":
        return re.compile(rf"<({known})>|(?<![^ \n])embedding:(\S+)", re.IGNORECASE)
    # a name ends where a word would: `cat` is not in `cats`
    return re.compile(rf"<({known})>|(?<![^\W_])(?:embedding:)?({known})(?![^\W_])", re.IGNORECASE)


def _filled(groups: Sequence[Group], room: int, comma: int | None) -> Iterator[Group]:
    """A1111's rule; without a comma's id the plain one."""
    chunk: Group = []
    last_comma, count = None, 0
    for group in groups:
        if group and group[0].id == comma and group[0].vector is None:
            last_comma = len(chunk)
        elif group and len(chunk) == room and last_comma is not None and room - last_comma <= BACKTRACK:
            yield chunk[: last_comma + 1]
            chunk, last_comma, count = chunk[last_comma + 1 :], None, count + 1
        if not group or len(chunk) + len(group) > room:
            yield chunk
            chunk, last_comma, count = [], None, count + 1
        chunk = chunk + group
    if chunk or not count:
        yield chunk


def _comfy(groups: Sequence[Group], room: int) -> Iterator[Group]:
    chunk: Group = []
    for group in groups:
        parted, rest = len(group) >= min(WHOLE, room + 1), group
        while len(chunk) + len(rest) > room:
            cut = room - len(chunk) if parted else 0
            yield chunk + rest[:cut]
            chunk, rest = [], rest[cut:]
        chunk = chunk + rest
    yield chunk


def _compel(tokens: Group, room: int, tokenizer: Tokenizer) -> Iterator[Group]:
    first = 0
    while len(tokens) - first > room:
        cut = _compel_cut([tokenizer.token(token.id) for token in tokens[first : first + room]]) + first
        while (vector := tokens[cut].vector) and vector[1] > 0:  # to where the embedding begins
            cut -= 1
        yield tokens[first:cut]
        first = cut
    yield tokens[first:]


def _compel_cut(words: Sequence[str]) -> int:
    """How many of the tokens of a full window to keep: to the end of its last sentence, phrase or word."""
    sentences, phrases, ends = (
        [count for count, word in enumerate(words, 1) if ended(word)]
        for ended in (PHRASES[:1].__contains__, PHRASES.__contains__, lambda word: word.endswith("</w>"))
    )
    return (sentences or phrases or ends or [len(words)])[-1]
