"""The prompt as a language, in four dialects: `a1111` (the default), `comfy`, `compel` and `plain` words. No torch.

`parse` is the last pass, text to weighted spans; `plan` is the whole: parts, what is said until which step, blends,
networks. `write` goes back, `convert` from one dialect to another, `lint` says what an author might not have meant, and
`expand` draws `{a|b}` and wildcards. In each dialect a prompt means what it means in the program that the dialect comes
from, oddities included; docs/prompts.md has the tables. All of it takes time in proportion to the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mezzotint.errors import RequestError
from mezzotint.prompt import a1111, comfy, compel
from mezzotint.prompt.choices import expand
from mezzotint.prompt.pieces import (
    MAX_WEIGHT,
    Clause,
    Network,
    Part,
    PromptPlan,
    Remark,
    Span,
    Traced,
    Variant,
)

__all__ = [
    "MAX_WEIGHT",
    "SYNTAXES",
    "Clause",
    "Network",
    "Part",
    "PromptPlan",
    "Remark",
    "Span",
    "Variant",
    "convert",
    "expand",
    "lint",
    "parse",
    "plan",
    "write",
]

SYNTAXES = ("a1111", "comfy", "compel", "plain")


def parse(text: str, syntax: str = "a1111") -> list[tuple[str, float]]:
    """The last pass: what is encoded, as (text, weight) pairs.

    A1111's BREAK is ("BREAK", -1.0). The texts of Compel's `.and()` and `.blend()` follow each other; `plan` keeps them
    apart. A weight may be infinite or NaN here where it is in the original. RequestError only where the original fails
    too, as A1111 does with `(a:.)`.
    """
    return [(span.text, span.weight) for clause in _clauses(text, syntax) for span in clause.spans]


def plan(
    text: str,
    syntax: str = "a1111",
    steps: int = 50,
    *,
    negative: bool = False,
    base_steps: int | None = None,
) -> PromptPlan:
    """The whole meaning of a prompt in a run of `steps` steps (1 or more).

    In a `negative` prompt A1111 reads neither networks nor AND: they are words there. `base_steps`, if this is a second
    pass (A1111's hires fix), is the number of steps of the first; prompt editing goes on counting from there.
    RequestError where the original fails, for text that is not valid Unicode, and for weights beyond MAX_WEIGHT.
    """
    if steps < 1:
        raise RequestError(f"steps is {steps}; it must be 1 or more")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt has half of a character (a lone surrogate) at {error.start}; it must be text"
        ) from None
    source = Traced.of(text)
    left, networks = text, tuple[Network, ...]()
    if _known(syntax) == "a1111":
        left, parts, networks = a1111.read(source, steps, negative, base_steps)
    elif syntax == "compel":
        clauses, join, networks = compel.read(source)
        parts = (Part((Variant(steps, text, clauses, join),)),)
        for network in networks:
            left = left.replace(text[network.start : network.end], "", 1)
    else:
        parts = (Part((Variant(steps, text, tuple(_clauses(text, syntax))),)),)
    _check_weights(parts)
    return PromptPlan(text, syntax, steps, left, parts, networks)


def write(spans: Sequence[tuple[str, float]], syntax: str = "a1111") -> str:
    """The text that `parse` reads as these (text, weight) pairs, if they came from `parse` in this dialect.

    In plain the weights are lost. RequestError for a weight that is not finite, and for one below 0 in compel.
    """
    match _known(syntax):
        case "a1111":
            return a1111.write(list(spans))
        case "comfy":
            return comfy.write(list(spans))
        case "compel":
            return compel.write(list(spans))
    return "".join(text for text, _ in spans)


def convert(text: str, source: str, target: str) -> tuple[str, list[str]]:
    """A prompt of one dialect said in another as nearly as it can be, and a sentence on each thing that it cannot."""
    from mezzotint.prompt.converting import converted

    return converted(plan(text, source, 100), _known(target))


def lint(text: str, syntax: str = "a1111") -> list[Remark]:
    """What the author of a prompt may not have meant, in the order of the text."""
    from mezzotint.prompt.linting import remarks

    return remarks(text, _known(syntax))


def _known(syntax: str) -> str:
    if syntax not in SYNTAXES:
        near = difflib.get_close_matches(str(syntax), SYNTAXES, 1, 0.0)[0]
        raise RequestError(
            f"prompt_syntax is {syntax!r}; it must be one of {', '.join(SYNTAXES)} (did you mean {near}?)"
        )
    return syntax


def _clauses(text: str, syntax: str) -> Sequence[Clause]:
    traced = Traced.of(text)
    match _known(syntax):
        case "a1111":
            return [Clause(tuple(a1111.spans(traced)))]
        case "comfy":
            return [Clause(tuple(comfy.spans(traced)))]
        case "compel":
            return compel.read(traced)[0]
    return [Clause((Span(text, 1.0, traced.places),))]


def _check_weights(parts: tuple[Part, ...]) -> None:
    clauses = [clause for part in parts for variant in part.variants for clause in variant.clauses]
    weights = [
        *(("a part", part.weight) for part in parts),
        *(("a text", clause.weight) for clause in clauses),
        *((repr(span.text[:40]), span.weight) for clause in clauses for span in clause.spans),
    ]
    for what, weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise RequestError(f"prompt gives {what} the weight {weight:g}; it must be at most {MAX_WEIGHT:,.0f}")
