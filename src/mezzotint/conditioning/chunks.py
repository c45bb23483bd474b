"""Splits the spans of a prompt into chunks, the tokens that one window of a text encoder holds between BOS and EOS.

Each dialect splits a text that is longer than a window (75 tokens, or the model's own window - 2) in its own way:

- a1111: at the end of the window, or after a comma at most 20 tokens before it; `BREAK` ends a chunk anywhere
- comfy: at the end of the window, but a segment (text of one weight, or an embedding) below 8 tokens is not split
- compel: after the last sentence that fits, the last phrase or the last word
- plain: at the end of the window

Nothing is cut off. An embedding (textual inversion) is used where its trigger is written: `name`, `<name>` or
`embedding:name`; in comfy a bare name is an ordinary word. The vectors of an embedding stay in one chunk, except for
embeddings of 8 or more vectors in comfy, which are split like any long segment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import NamedTuple

from mezzotint.errors import RequestError
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.prompt import Span

COMMA_BACKTRACK = 20  # tokens, A1111's default of comma_padding_backtrack
COMFY_MAX_WORD_LENGTH = 8  # tokens, ComfyUI's max_word_length: shorter segments are not split
PLACEHOLDER_ID = 0  # token id in the place of an embedding's vector, as in A1111; any id but EOS
PHRASE_ENDS = (".</w>", ",</w>", ";</w>", ":</w>")


class Token(NamedTuple):
    """One token of a chunk.

    Attributes:
        id: The token id.
        weight: The weight of the span.
        start: Where the token starts in the prompt as it was written.
        end: Where it ends.
        span: Number of the span that it belongs to.
        vector: (trigger, row) of an embedding's vector that replaces the token's own.
    """

    id: int
    weight: float
    start: int
    end: int
    span: int
    vector: tuple[str, int] | None = None


Chunk = tuple[Token, ...]
Embeddings = Mapping[str, Sequence[Sized]]  # trigger -> its vectors for each text encoder
Group = list[Token]  # tokens that stay together: one token, an embedding, or in comfy a segment; empty is a BREAK


def split_into_chunks(
    spans: Sequence[Span], syntax: str, tokenizer: Tokenizer, embeddings: Embeddings | None = None, encoder: int = 0
) -> list[Chunk]:
    """Split a text into chunks of at most window - 2 tokens.

    Args:
        spans: The weighted spans of the text.
        syntax: The dialect.
        tokenizer: The tokenizer of the text encoder.
        embeddings: For each trigger (lower case, without <>), the vectors for each text encoder.
        encoder: Number of the text encoder.

    Returns:
        The chunks, at least one.

    Raises:
        RequestError: If an embedding does not fit in a window or, in comfy, if the prompt names an unknown one.
    """
    embeddings = embeddings or {}
    capacity = tokenizer.max_length - 2
    groups = [
        group for k, span in enumerate(spans) for group in _groups(span, k, syntax, tokenizer, embeddings, encoder)
    ]
    for group in groups:
        if group and group[0].vector and len(group) > capacity and syntax != "comfy":
            raise RequestError(
                f"the embedding {group[0].vector[0]!r} has {len(group)} vectors; it must have at most {capacity}, the "
                "tokens that a window of this text encoder holds"
            )
    if syntax == "comfy":
        return [tuple(chunk) for chunk in _fill_comfy_chunks(groups, capacity)]
    if syntax == "compel":
        tokens = [token for group in groups for token in group]
        return [tuple(chunk) for chunk in _fill_compel_chunks(tokens, capacity, tokenizer)]
    comma = tokenizer.vocab.get(",</w>") if syntax == "a1111" else None
    return [tuple(chunk) for chunk in _fill_chunks(groups, capacity, comma)]


def _groups(
    span: Span, number: int, syntax: str, tokenizer: Tokenizer, embeddings: Embeddings, encoder: int
) -> Iterator[Group]:
    """Yield the groups of tokens of a span."""
    if syntax == "a1111" and span.is_break:
        yield []
        return
    for start, end, name in _pieces(span.text, syntax, embeddings):
        if name is not None:
            source_range = span.where(start, end)
            rows = range(len(embeddings[name][encoder]))
            yield [Token(PLACEHOLDER_ID, span.weight, *source_range, number, (name, row)) for row in rows]
            continue
        tokens = [
            Token(id, span.weight, *span.where(start + first, start + last), number)
            for id, first, last in tokenizer.encode_with_offsets(span.text[start:end])
        ]
        if syntax == "comfy":
            yield from [tokens] if tokens else []
        else:
            yield from ([token] for token in tokens)


def _pieces(text: str, syntax: str, embeddings: Embeddings) -> Iterator[tuple[int, int, str | None]]:
    """Yield (start, end, trigger) of the pieces of a text; the trigger of ordinary words is None."""
    done = 0
    for start, end, name in _named(text, syntax, embeddings):
        if done < start:
            yield done, start, None
        yield start, end, name
        done = end
    if done < len(text):
        yield done, len(text), None


def _named(text: str, syntax: str, embeddings: Embeddings) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, trigger) of the embeddings that a text names."""
    for match in _triggers(syntax, tuple(embeddings)).finditer(text):
        name = next(group for group in match.groups() if group is not None)
        if name.lower() in embeddings:
            yield *match.span(), name.lower()
            continue
        start = match.start()  # comfy's embedding:name, which may end in commas or a file suffix; or several of them
        for written in re.split(r"(?<=,)(?=embedding:)", match[0], flags=re.IGNORECASE):
            bare = written.rstrip(",")
            name = re.sub(r"\.(safetensors|pt|bin)$", "", bare[len("embedding:") :].lower())
            if name not in embeddings:
                available = ", ".join(sorted(embeddings)[:5]) or "none"
                raise RequestError(f"the prompt uses embedding:{name[:60]}; the available embeddings are {available}")
            yield start, start + len(bare), name
            start += len(written)


@functools.lru_cache(maxsize=64)
def _triggers(syntax: str, names: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds embeddings; the name is the group that matched."""
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
    if syntax == "comfy":
        return re.compile(rf"<({known})>|(?<![^ \n])embedding:(\S+)", re.IGNORECASE)
    # a name matches whole words only: not `cat` in `cats`
    return re.compile(rf"<({known})>|(?<![^\W_])(?:embedding:)?({known})(?![^\W_])", re.IGNORECASE)


def _fill_chunks(groups: Sequence[Group], capacity: int, comma: int | None) -> Iterator[Group]:
    """Fill chunks by A1111's rule or, without the id of the comma, in plain order."""
    chunk: Group = []
    last_comma, count = None, 0
    for group in groups:
        if group and group[0].id == comma and group[0].vector is None:
            last_comma = len(chunk)
        elif group and len(chunk) == capacity and last_comma is not None and capacity - last_comma <= COMMA_BACKTRACK:
            yield chunk[: last_comma + 1]
            chunk, last_comma, count = chunk[last_comma + 1 :], None, count + 1
        if not group or len(chunk) + len(group) > capacity:
            yield chunk
            chunk, last_comma, count = [], None, count + 1
        chunk = chunk + group
    if chunk or not count:
        yield chunk


def _fill_comfy_chunks(groups: Sequence[Group], capacity: int) -> Iterator[Group]:
    """Fill chunks by ComfyUI's rule."""
    chunk: Group = []
    for group in groups:
        splittable, rest = len(group) >= min(COMFY_MAX_WORD_LENGTH, capacity + 1), group
        while len(chunk) + len(rest) > capacity:
            cut = capacity - len(chunk) if splittable else 0
            yield chunk + rest[:cut]
            chunk, rest = [], rest[cut:]
        chunk = chunk + rest
    yield chunk


def _fill_compel_chunks(tokens: Group, capacity: int, tokenizer: Tokenizer) -> Iterator[Group]:
    """Fill chunks by Compel's rule."""
    first = 0
    while len(tokens) - first > capacity:
        cut = _compel_cut([tokenizer.token(token.id) for token in tokens[first : first + capacity]]) + first
        while (vector := tokens[cut].vector) and vector[1] > 0:  # never split an embedding
            cut -= 1
        yield tokens[first:cut]
        first = cut
    yield tokens[first:]


def _compel_cut(words: Sequence[str]) -> int:
    """Return how many tokens of a full window to keep: up to its last sentence, phrase or word."""
    sentences, phrases, ends = (
        [count for count, word in enumerate(words, 1) if is_end(word)]
        for is_end in (PHRASE_ENDS[:1].__contains__, PHRASE_ENDS.__contains__, lambda word: word.endswith("</w>"))
    )
    return (sentences or phrases or ends or [len(words)])[-1]
