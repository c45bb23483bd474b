"""The data structures of a parsed prompt, with their positions in the source, the text as the user typed it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mezzotint.errors import RequestError

MAX_WEIGHT = 1e6  # larger weights overflow in float16 and float32


class SourceText(NamedTuple):
    """A text that knows where its characters come from: `text[i]` is (or stands for) `source[places[i]]`."""

    text: str
    places: Sequence[int]  # as long as text

    @classmethod
    def from_source(cls, source: str) -> SourceText:
        """Return the source itself."""
        return cls(source, range(len(source)))

    def slice(self, start: int, end: int | None = None) -> SourceText:
        """Return the text from start to end."""
        return SourceText(self.text[start:end], self.places[start:end])

    @classmethod
    def join(cls, parts: Iterable[SourceText]) -> SourceText:
        """Concatenate texts."""
        parts = [part for part in parts if part.text]
        if len(parts) == 1:
            return parts[0]
        places = array("I")
        for part in parts:
            places.extend(part.places)
        return cls("".join(part.text for part in parts), places)


@dataclass(frozen=True)
class Span:
    """Text of one weight.

    Attributes:
        text: The text as it is encoded, without escapes.
        weight: Its weight.
        places: `places[i]` is the index of `text[i]` in the source. A character that the grammar inserts, such as
            Compel's space between two words, has the index of its neighbor.
    """

    text: str
    weight: float = 1.0
    places: Sequence[int] = field(default=(), repr=False, compare=False)

    @property
    def start(self) -> int:
        """Where the span starts in the source."""
        return self.where(0, len(self.text))[0]

    @property
    def end(self) -> int:
        """Where the span ends in the source."""
        return self.where(0, len(self.text))[1]

    def where(self, start: int, end: int) -> tuple[int, int]:
        """Return the smallest range (start, end) of the source that holds text[start:end]; (0, 0) for an empty text."""
        places = self.places[start:end]
        return (min(places), max(places) + 1) if places else (0, 0)

    @property
    def is_break(self) -> bool:
        """Whether it is A1111's BREAK, which ends a chunk; brackets around the word make it an ordinary word."""
        return self.text == "BREAK" and self.weight == -1.0


@dataclass(frozen=True)
class Clause:
    """One text to encode. Its weight is 1, except in Compel's `.and()` and `.blend()`."""

    spans: tuple[Span, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Variant:
    """The text of a prompt until a step (see `Part.at`).

    Attributes:
        until: The last step that it holds for.
        text: The text that the spans were parsed from.
        clauses: At least one; only Compel has several.
        join: How several clauses are combined: "concat", along the token axis, each first weighted against the empty
            prompt (empty + (z - empty) * weight); "blend", their weighted mean; "blend_no_normalize", their weighted
            sum.
    """

    until: int
    text: str
    clauses: tuple[Clause, ...]
    join: str = "concat"

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of the first clause, which is the only one in a1111, comfy and plain."""
        return self.clauses[0].spans


@dataclass(frozen=True)
class Part:
    """A prompt between two `AND`s. Guidance adds (cond - uncond) * weight over the parts."""

    variants: tuple[Variant, ...]  # at least one, in order of `until`
    weight: float = 1.0

    def at(self, step: int) -> Variant:
        """Return the variant for a step, counted from 0.

        It is the first one with step <= until. As in A1111, whose sampler counts steps from 0 and whose schedule from
        1, a variant until step 3 is used four times.
        """
        index = bisect_left([variant.until for variant in self.variants], step)
        return self.variants[index if index < len(self.variants) else 0]


@dataclass(frozen=True)
class Network:
    """A network in the text: `<kind:name:args:key=option>` in A1111, `withLora(name, 0.8)` in Compel."""

    kind: str  # "lora", "hypernet", ...
    name: str
    args: tuple[str, ...]  # positional arguments after the name; the weight is the first
    options: Mapping[str, str]  # keyword arguments, such as te and unet
    start: int  # position in the source
    end: int


@dataclass(frozen=True)
class PromptPlan:
    """The whole meaning of a prompt."""

    source: str
    syntax: str
    steps: int
    text: str  # the source without networks and comments
    parts: tuple[Part, ...]  # split at AND
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class Remark:
    """A sentence for the author of a prompt about source[start:end]."""

    start: int
    end: int
    sentence: str


def parse_number(text: str, whole: str) -> float:
    """Return a weight as a float; where Python cannot parse it, the original program fails too."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(
            f"prompt has the weight {text!r} in {whole!r}; it must be a number, as in (text:1.2)"
        ) from None


def format_decimal(weight: float) -> str:
    """Format a finite number without an exponent, such that float() returns the same number."""
    from decimal import Decimal

    if weight in (float("inf"), float("-inf")) or weight != weight:
        raise RequestError(f"a weight of {weight} cannot be written; it must be a finite number")
    text = format(Decimal(repr(weight)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
