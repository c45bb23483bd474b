"""The tokens of a prompt as JSON values: their weights, chunks, and the steps in which they are used."""

from __future__ import annotations

from typing import Any

from mezzotint.conditioning.chunks import split_into_chunks
from mezzotint.conditioning.encode import parse_prompt
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.prompt import Clause, lint
from mezzotint.request import Request
from mezzotint.weights.embeddings import Library


def describe_tokens(
    request: Request, tokenizers: list[Tokenizer], library: Library, steps: int, *, negative: bool = False
) -> dict[str, Any]:
    """Describe the tokens of a request's prompt.

    Args:
        request: Gives the prompt, its syntax and what else its reading depends on.
        tokenizers: The tokenizer of each text encoder.
        library: The embeddings.
        steps: The number of steps of the run, for prompt editing.
        negative: Whether it is read as a negative prompt.
    """
    plan = parse_prompt(request, request.prompt, steps, negative=negative)
    return {
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
