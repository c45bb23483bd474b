"""What a prompt is read into. All of it keeps its place in the source: the text as the user typed it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mezzotint.errors import RequestError

MAX_WEIGHT = 1e6  # a weight beyond it makes infinities in float32 and float16, not a picture


class Traced(NamedTuple):
    """A text that knows where its characters came from: `text[i]` is (or stands for) `source[places[i]]`."""

    text: str
    places: Sequence[int]  # as long as text

    @classmethod
    def of(cls, source: str) -> Traced:
        return cls(source, range(len(source)))

    def cut(self, start: int, end: int | None = None) -> Traced:
        return Traced(self.text[start:end], self.places[start:end])

    @classmethod
    def join(cls, parts: Iterable[Traced]) -> Traced:
        parts = [part for part in parts if part.text]
        if len(parts) == 1:
            return parts[0]
        places = array("I")
        for part in parts:
            places.extend(part.places)
        return cls("".join(part.text for part in parts), places)


@dataclass(frozen=True)
class Span:
    """A stretch of text of one weight. `text` is what the encoder sees, with escapes undone.

    `places[i]` is the index in the source of `text[i]`; a character that the grammar put in itself, such as Compel's
    space between two words, has the place of its neighbour.
    """

    text: str
    weight: float = 1.0
    places: Sequence[int] = field(default=(), repr=False, compare=False)

    @property
    def start(self) -> int:
        return self.where(0, len(self.text))[0]

    @property
    def end(self) -> int:
        return self.where(0, len(self.text))[1]

    def where(self, start: int, end: int) -> tuple[int, int]:
        """The smallest stretch (start, end) of the source that holds text[start:end]; (0, 0) for no text."""
        places = self.places[start:end]
        return (min(places), max(places) + 1) if places else (0, 0)

    @property
    def is_break(self) -> bool:
        """A1111's BREAK, which ends a chunk. Its own test, which a bracket around the word fails."""
        return self.text == "BREAK" and self.weight == -1.0


@dataclass(frozen=True)
class Clause:
    """One text to encode. Its weight is 1 but in Compel's `.and()` and `.blend()`."""

    spans: tuple[Span, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Variant:
    """What a prompt says until a step (see `Part.at`).

    `join` says what becomes of several clauses: "concat" along the token axis, each first weighted against the empty
    prompt (empty + (z - empty) * weight); "blend", their sum with the weights divided by the weights' sum;
    "blend_no_normalize", their sum with the weights as they are.
    """

    until: int
    text: str  # what the weights were read from
    clauses: tuple[Clause, ...]  # one at least; more than one in Compel alone
    join: str = "concat"

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of the first clause, which in a1111, comfy and plain is the only one."""
        return self.clauses[0].spans


@dataclass(frozen=True)
class Part:
    """A prompt between two `AND`s. Guidance adds up (cond - uncond) * weight over the parts."""

    variants: tuple[Variant, ...]  # one at least, by rising `until`
    weight: float = 1.0

    def at(self, step: int) -> Variant:
        """The variant for a step, counted from 0. As in A1111, whose sampler counts from 0 and whose schedule from 1,
        it is the first one with step <= until: what holds until step 3 is used four times.
        """
        index = bisect_left([variant.until for variant in self.variants], step)
        return self.variants[index if index < len(self.variants) else 0]


@dataclass(frozen=True)
class Network:
    """A network asked for in the text: `<kind:name:args:key=option>` in A1111, `withLora(name, 0.8)` in Compel."""

    kind: str  # "lora", "hypernet", ...
    name: str
    args: tuple[str, ...]  # after the name, by position: the weight first
    options: Mapping[str, str]  # by key, such as te and unet
    start: int  # its place in the source
    end: int


@dataclass(frozen=True)
class PromptPlan:
    """The whole meaning of a prompt."""

    source: str
    syntax: str
    steps: int
    text: str  # the source without networks and comments
    parts: tuple[Part, ...]  # one, or one for each `AND` and one more
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class Remark:
    """Something that the author of a prompt should know: a sentence about source[start:end]."""

    start: int
    end: int
    sentence: str


def number(text: str, whole: str) -> float:
    """A weight as it is written; where Python cannot read it, neither can the original, which fails there."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(
            f"prompt has the weight {text!r} in {whole!r}; it must be a number, as in (text:1.2)"
        ) from None


def decimal(weight: float) -> str:
    """A finite number written without an exponent, so that float() of it is the same number."""
    from decimal import Decimal

    if weight in (float("inf"), float("-inf")) or weight != weight:
        raise RequestError(f"a weight of {weight} cannot be written; it must be a finite number")
    text = format(Decimal(repr(weight)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
