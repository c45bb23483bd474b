"""`mezzotint tokens`: show how a prompt is parsed, tokenized and split into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from mezzotint.cli.fields import read_prompt
from mezzotint.cli.options import (
    PROMPT,
    SAMPLING,
    Embedding,
    Json,
    Model,
    Syntax,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import print_json, show


@add_options_of(model_options)
def tokens(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt. - reads standard input.")],
    model: Model = None,
    syntax: Syntax = None,
    embedding: Embedding = None,
    steps: Annotated[
        int | None,
        option("Number of steps of the run, for prompt editing.", "N", SAMPLING, default="the model's own, or 50"),
    ] = None,
    negative: Annotated[bool, option("Read it as a negative prompt.", None, PROMPT, name="--negative")] = False,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Show the tokens of a prompt, their weights and chunks."""
    model_given = take_model_options(overrides)
    from mezzotint.request import Request

    request = Request(
        prompt=read_prompt(prompt),
        prompt_syntax=syntax,
        steps=steps,
        embeddings=tuple(embedding) if embedding else None,
    )

    from mezzotint.run.resolve import STEPS
    from mezzotint.run.tokens import describe_tokens
    from mezzotint.weights.checkpoint import read_tokenizers
    from mezzotint.weights.embeddings import Library
    from mezzotint.weights.hub import BUNDLED

    tokenizers, widths, settings = read_tokenizers(model or BUNDLED, **model_given)
    steps = steps or int(settings.get("steps", STEPS))
    library = Library(request.embeddings or (), widths)
    record = describe_tokens(request, tokenizers, library, steps, negative=negative)
    if as_json:
        print_json(record)
    else:
        show(*_lines(record, request.prompt))


def _lines(record: dict[str, Any], source: str) -> Iterator[str]:
    """Yield the lines for a person; SDXL's second encoder only where its chunks differ."""
    window, parts = record["window"], record["parts"]
    yield f"{record['syntax']}, at most {window} tokens per chunk"
    for number, part in enumerate(parts, 1):
        if len(parts) > 1:
            yield f"part {number} of {len(parts)} (AND), weight {part['weight']:g}"
        elif part["weight"] != 1.0:
            yield f"the whole prompt, weight {part['weight']:g}"
        for variant in part["variants"]:
            if len(part["variants"]) > 1:
                stretches = [f"{a + 1} to {b + 1}" if a < b else f"{a + 1}" for a, b in variant["steps"]]
                more = " ..." if len(stretches) > 4 else ""
                yield f"steps {', '.join(stretches[:4]) or 'none'}{more}: {variant['text']}"
            for clause in variant["clauses"]:
                if len(variant["clauses"]) > 1:
                    yield f"text of weight {clause['weight']:g} ({variant['join']})"
                encoders = [[[row["token"] for row in chunk] for chunk in chunks] for chunks in clause["encoders"]]
                for k, chunks in enumerate(clause["encoders"]):
                    if k == 0 or encoders[k] != encoders[0]:
                        if k:
                            yield "the second text encoder:"
                        yield from _table(chunks, window, source)
    for network in record["networks"]:
        yield f"{network} is not part of the text"
    for remark in record["remarks"]:
        yield f"note: {remark['remark']}"


def _table(chunks: list[list[dict[str, Any]]], window: int, source: str) -> Iterator[str]:
    for number, chunk in enumerate(chunks, 1):
        widest = max((len(row["token"]) for row in chunk), default=0)
        for place, row in enumerate(chunk, 1):
            written = source[row["start"] : row["end"]]
            yield f"  {number}.{place:<4}{row['token']:<{widest}}  {row['weight']:<8.4g}{written!r}"
        yield f"  chunk {number} of {len(chunks)} ends: {len(chunk)} of {window} tokens"
