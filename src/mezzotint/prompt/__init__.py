"""The prompt language, in four dialects: `a1111` (the default), `comfy`, `compel` and `plain`. No torch here.

`parse` returns weighted spans; `plan` the whole meaning: parts, the text of each step, blends and networks. `write` is
the inverse of `parse`, `convert` translates between dialects, `lint` finds likely mistakes, and `expand` draws `{a|b}`
choices and wildcards. A prompt means what it means in the program that the dialect comes from, including its quirks;
docs/prompts.md has the tables. Every function takes time linear in the length of the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Sequence

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
    SourceText,
    Span,
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
    """Return the weighted spans of a prompt as (text, weight) pairs, as they are encoded.

    A1111's BREAK is ("BREAK", -1.0). The texts of Compel's `.and()` and `.blend()` are concatenated; `plan` keeps them
    apart. A weight may be infinite or NaN where it is in the original program.

    Raises:
        RequestError: Where the original program fails, as A1111 does for `(a:.)`.
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
    """Return the whole meaning of a prompt in a run.

    Args:
        text: The prompt.
        syntax: The dialect.
        steps: Number of steps of the run, at least 1.
        negative: Whether it is a negative prompt, in which A1111 reads neither networks nor AND.
        base_steps: For a second pass (A1111's hires fix), the number of steps of the first; prompt editing continues to
            count from there.

    Raises:
        RequestError: Where the original program fails, if the text is not valid Unicode, and for weights above
            MAX_WEIGHT.
    """
    if steps < 1:
        raise RequestError(f"steps is {steps}; it must be 1 or more")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt has a lone surrogate at character {error.start}; it must be valid Unicode"
        ) from None
    source = SourceText.from_source(text)
    left, networks = text, tuple[Network, ...]()
    if _check_syntax(syntax) == "a1111":
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
    """Return the text that `parse` reads as these (text, weight) pairs, if they came from `parse` in this dialect.

    The plain dialect loses the weights.

    Raises:
        RequestError: If a weight is not finite or, in compel, is negative.
    """
    match _check_syntax(syntax):
        case "a1111":
            return a1111.write(list(spans))
        case "comfy":
            return comfy.write(list(spans))
        case "compel":
            return compel.write(list(spans))
    return "".join(text for text, _ in spans)


def convert(text: str, source: str, target: str) -> tuple[str, list[str]]:
    """Translate a prompt into another dialect, as closely as possible.

    Returns:
        The text, and one sentence for each thing that the other dialect cannot express.
    """
    from mezzotint.prompt.converting import convert_plan

    return convert_plan(plan(text, source, 100), _check_syntax(target))


def lint(
    text: str,
    syntax: str = "a1111",
    meaning: PromptPlan | None = None,
    *,
    negative: bool = False,
    embeddings: Container[str] = (),
) -> list[Remark]:
    """Return remarks on what the author of a prompt may not have meant, in the order of the text.

    Args:
        text: The prompt.
        syntax: The dialect.
        meaning: What `plan` returned for it, if it is known; otherwise the prompt is parsed.
        negative: Whether it is a negative prompt.
        embeddings: The names of embeddings that are loaded, in lower case.
    """
    from mezzotint.prompt.linting import find_remarks

    return find_remarks(text, _check_syntax(syntax), meaning, negative, embeddings)


def _check_syntax(syntax: str) -> str:
    """Return the syntax, or raise RequestError if it is unknown."""
    if syntax not in SYNTAXES:
        near = difflib.get_close_matches(str(syntax), SYNTAXES, 1, 0.0)[0]
        raise RequestError(
            f"prompt_syntax is {syntax!r}; it must be one of {', '.join(SYNTAXES)} (did you mean {near}?)"
        )
    return syntax


def _clauses(text: str, syntax: str) -> Sequence[Clause]:
    """Return the clauses of a prompt."""
    source = SourceText.from_source(text)
    match _check_syntax(syntax):
        case "a1111":
            return [Clause(tuple(a1111.spans(source)))]
        case "comfy":
            return [Clause(tuple(comfy.spans(source)))]
        case "compel":
            return compel.read(source)[0]
    return [Clause((Span(text, 1.0, source.places),))]


def _check_weights(parts: tuple[Part, ...]) -> None:
    """Raise RequestError for a weight that is not finite or too large."""
    clauses = [clause for part in parts for variant in part.variants for clause in variant.clauses]
    weights = [
        *(("a part", part.weight) for part in parts),
        *(("a text", clause.weight) for clause in clauses),
        *((repr(span.text[:40]), span.weight) for clause in clauses for span in clause.spans),
    ]
    for what, weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise RequestError(f"prompt gives {what} the weight {weight:g}; it must be at most {MAX_WEIGHT:,.0f}")
