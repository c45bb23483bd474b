"""`mezzotint tokens`: show how a prompt is parsed, tokenized and split into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from mezzotint.models.tokenizer import Tokenizer
    from mezzotint.prompt import Clause
    from mezzotint.weights.embeddings import Library


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

    from mezzotint.conditioning.encode import parse_prompt
    from mezzotint.prompt import lint
    from mezzotint.run.resolve import STEPS
    from mezzotint.weights.checkpoint import read_tokenizers
    from mezzotint.weights.embeddings import Library
    from mezzotint.weights.hub import BUNDLED

    tokenizers, widths, settings = read_tokenizers(model or BUNDLED, **model_given)
    steps = steps or int(settings.get("steps", STEPS))
    plan = parse_prompt(request, request.prompt, steps, negative=negative)
    library = Library(request.embeddings or (), widths)
    record: dict[str, Any] = {
        "syntax": plan.syntax,
        "window": tokenizers[0].max_length - 2,
        "remarks": [
            {"start": remark.start, "end": remark.end, "remark": remark.sentence}
            for remark in lint(request.prompt, plan.syntax, plan, negative=negative, embeddings=library)
        ],
        "networks": [request.prompt[network.start : network.end] for network in plan.networks],
        "parts": [
            {
                "weight": part.weight,
                "variants": [
                    {
                        "steps": _stretches([at == text for at in spoken]),
                        "text": text,
                        "join": variant.join,
                        "clauses": [_clause(clause, plan.syntax, tokenizers, library) for clause in variant.clauses],
                    }
                    for text, variant in {variant.text: variant for variant in part.variants}.items()
                ],
            }
            for part in plan.parts
            for spoken in [[part.at(step).text for step in range(steps)]]
        ],
    }
    if as_json:
        print_json(record)
    else:
        show(*_lines(record, request.prompt))


def _stretches(spoken: list[bool]) -> list[list[int]]:
    """Return (first, last) of each range of consecutive steps, from 0, in which a text is used."""
    stretches: list[list[int]] = []
    for step in (step for step, is_it in enumerate(spoken) if is_it):
        if stretches and stretches[-1][1] == step - 1:
            stretches[-1][1] = step
        else:
            stretches.append([step, step])
    return stretches


def _clause(clause: Clause, syntax: str, tokenizers: list[Tokenizer], library: Library) -> dict[str, Any]:
    """Describe one text to encode: its weight, and the chunks for each text encoder."""
    from mezzotint.conditioning.chunks import split_into_chunks

    encoders = []
    for k, tokenizer in enumerate(tokenizers):
        chunks = []
        for chunk in split_into_chunks(clause.spans, syntax, tokenizer, library, k):
            rows = []
            for token in chunk:
                word = f"<{token.vector[0]}>[{token.vector[1]}]" if token.vector else tokenizer.token(token.id)
                place = {"start": token.start, "end": token.end}
                rows.append({"token": word, "id": token.id, "weight": token.weight, **place})
            chunks.append(rows)
        encoders.append(chunks)
    return {"weight": clause.weight, "encoders": encoders}


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
