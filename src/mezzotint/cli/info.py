"""`mezzotint info`: show what the record of a picture holds, without drawing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.options import Json
from mezzotint.cli.terminal import print_json, show

SHA256 = re.compile("[0-9a-f]{64}")
MAX_SHOWN = 2000  # characters of a text that cannot be read


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="PNG, JPEG or WebP picture that carries a record.")],
    as_json: Json = False,
) -> None:
    """Show what a picture was drawn with, from its record.

    The record may be mezzotint's own, AUTOMATIC1111's, ComfyUI's or InvokeAI's.
    """
    from mezzotint.again import describe_file

    found = {"file": str(file), **describe_file(file)}
    if as_json:
        print_json(found)
    else:
        show(*_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for a person: the picture, the request, what else the pixels depend on."""
    yield f"{found['file']}: {found['format']}, {found['width']}x{found['height']}, record of {found['program']}"
    if found["unreadable"]:
        yield f"not read as a request: {found['unreadable']}"
        for name, text in found["texts"].items():
            yield f"{name}: {text[:MAX_SHOWN]}{' ...' if len(text) > MAX_SHOWN else ''}"
        return
    request = {name: value for name, value in found["request"].items() if value is not None}
    shown = {"seed": found["seed"]} if found["seed"] is not None else {}
    for name, value in (request | shown).items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"{name}: {text}"
    for name in ("model", "model_hash"):
        if found[name]:
            yield f"{name}: {found[name]}"
    for name, value in found["facts"].items():
        if value:
            yield f"{name.removeprefix('the ')}: {value[:10] + '...' if SHA256.fullmatch(value) else value}"
    for text in found["enlarged"]:
        yield f"enlarged: {text}"
    if found["flagged"] is not None:
        yield f"flagged by the safety checker: {'yes' if found['flagged'] else 'no'}"
    for note in found["not_supported"]:
        yield f"not supported: {note}"
    for notice in found["notices"]:
        yield f"notice: {notice}"
